"""SmolLM2-135M on web-scale text: the published optimizer setting of the 135M model, scaled to one node.

    pip install -r tools/requirements.txt
    python -m tools.corpus --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 \
        --max_tokens 2_000_000_000 --val_fraction 0.0005 --allow_unrepresentable \
        --out_dir data/cosmopedia
    torchrun --standalone --nproc_per_node=8 train.py config/cosmopedia.py --resume=auto
"""
out_dir = "out-cosmopedia"
data_dir = "data/cosmopedia"
max_steps = 8000  # 2.1 billion tokens
batch_size = 128
micro_batch_size = 8  # divides the share of each of 1, 2, 4, 8 or 16 processes
block_size = 2048
lr_schedule = "wsd"  # warm-up, constant, then linear decay over the last fifth
learning_rate = 3e-3
min_lr = 0.0
warmup_steps = 2000
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
eval_interval = 500
checkpoint_interval = 500
sample_interval = 1000
