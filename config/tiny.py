"""The same architecture at 3.3 million parameters (3.1 of them the embedding): about a minute on a laptop's CPU."""
out_dir = "out-tiny"
max_steps = 300
batch_size = 8
block_size = 64
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 20
eval_interval = 100
sample_interval = 300
checkpoint_interval = 100
hidden_size = 64
intermediate_size = 192
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
initializer_range = 0.125  # 64**-0.5
