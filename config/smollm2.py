"""SmolLM2-135M on Tiny Shakespeare: the setting of a published student run (loss 10.98 to 1.95 in 5,000 steps)."""
max_steps = 5000
batch_size = 4
block_size = 256
learning_rate = 3e-4
min_lr = 3e-5
warmup_steps = 100
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
# SmolLM2-135M, which is the default, too; named here so that a run of another size in out/ is not taken for this one.
vocab_size = 49152
hidden_size = 576
intermediate_size = 1536
num_hidden_layers = 30
num_attention_heads = 9
num_key_value_heads = 3
initializer_range = 0.041666666666666664  # 1/24, as published: the first loss is about 11.3 (the student run had 0.02)
