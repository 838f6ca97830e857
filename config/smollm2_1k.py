"""SmolLM2-135M on Tiny Shakespeare with longer sequences: the other published setting, 41 million tokens."""
out_dir = "out-1k"
max_steps = 5000
batch_size = 8
block_size = 1024
learning_rate = 3e-4
min_lr = 3e-5
warmup_steps = 100
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
