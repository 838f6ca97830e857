"""Goes on from the published SmolLM2-135M (downloaded once) on Tiny Shakespeare: a low rate, for about two epochs."""
out_dir = "out-finetune"
init_from = "HuggingFaceTB/SmolLM2-135M"  # or a folder that tools.export wrote; the model's sizes come from there
max_steps = 300
batch_size = 8
block_size = 256
learning_rate = 5e-5  # a sixth of the rate from scratch: the weights are good already
min_lr = 5e-6
warmup_steps = 20
weight_decay = 0.1
eval_interval = 50  # sample.py --checkpoint out-finetune/best takes the lowest
checkpoint_interval = 50
sample_interval = 100
