"""SmolLM2-135M in one file: the Llama architecture, its loss, and generation with a key/value cache.

    python model.py            # the module tree, the parameter table, FLOPs per token and per step

Modules, parameters and config fields carry Hugging Face's names, so weights go in and out without a table.
Sizes: Allal et al. 2025, "SmolLM2" (arXiv:2502.02737), and the published config.json of SmolLM2-135M.
"""
import json
import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class SmolLM2Config:
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    max_position_embeddings: int = 8192
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 576**-0.5  # 1/24, as published: the first loss is about 11.3 (with 0.02: 10.95)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


# ------------------------------------------------------------------------------------------------- the small parts


def linear(x, *layers):
    """The outputs of several bias-free layers on one input x (..., in_features), as one matrix product."""
    # Under torch.compile the concatenation is fused with autocast's cast of the weights, and so costs nothing.
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight).split([layer.out_features for layer in layers], dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, reduced in fp32. Zhang & Sennrich 2019 (arXiv:1910.07467)."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype)


def rotary_table(positions, config):
    """cos and sin (T, head_dim), fp32, of positions (T,): the angles of the first half repeated for the second.

    sin is negated in its first half, so that apply_rotary needs no other sign. Su et al. 2021 (arXiv:2104.09864)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponent)
    return torch.cat((angles, angles), dim=-1).cos(), torch.cat((-angles, angles), dim=-1).sin()


def apply_rotary(x, cos, sin):
    """Rotates x (..., head_dim) by its positions; its two halves form the pairs, as in Hugging Face."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).to(x.dtype)


def attention(q, k, v):
    """Causal attention, q (B, H, T, head_dim), k and v (B, H_kv, T, head_dim): H / H_kv query heads share a key head."""
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        return cpu_attention(q, k, v)
    if q.device.type == "mps":  # enable_gqa aborts the process there
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))


def cpu_attention(q, k, v):
    """Causal attention as two batched products around a fused softmax: half the time of the CPU's flash kernel.

    Blocks of queries skip the keys after them, and the probabilities are made again in the backward pass, so that
    memory does not grow with T * T. The query heads that share a key head form one matrix."""
    B, H, T, D = q.shape
    C = max(256, math.ceil(T / 4))

    def block(q, k, v, i):
        scores = (q.flatten(2, 3) @ k.transpose(-2, -1)).view(*q.shape[:4], -1)  # (B, H_kv, H / H_kv, C, keys)
        future = torch.full(scores.shape[-2:], -math.inf).triu(i + 1)
        att = (scores.float() * D**-0.5 + future).softmax(-1).to(v.dtype)
        return (att.flatten(2, 3) @ v).view(q.shape)

    q = q.reshape(B, k.size(1), -1, T, D)
    y = [checkpoint(block, q[:, :, :, i:i + C], k[:, :, :i + C], v[:, :, :i + C], i, use_reentrant=False)
         for i in range(0, T, C)]
    return torch.cat(y, dim=3).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, keep=None):
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
                   for t in linear(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if keep is not None:
            keep(k, v)
        y = attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU. Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = linear(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, keep=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------------- the loss


def softmax_minus_onehot(logits, targets):
    """Returns the cross-entropies (N,), fp32, and overwrites logits (N, V) by their gradients; 0 where ignored."""
    z = logits.float()
    logz = torch.logsumexp(z, dim=-1, keepdim=True)
    onehot = torch.arange(z.size(1), device=z.device) == targets[:, None]
    keep = targets[:, None] >= 0
    losses = torch.where(keep, logz - torch.where(onehot, z, 0.0).sum(-1, keepdim=True), 0.0)
    logits.copy_(torch.where(keep, torch.exp(z - logz) - onehot.float(), 0.0))
    return losses.squeeze(1)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, without ever holding fp32 logits for the whole batch.

    The gradient of the logits is softmax - onehot, known as soon as they are: the forward pass makes it in their
    place, and from it both gradients, by two matrix products. x: (N, C); weight: (V, C); targets: (N,), -100 ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, kernel, needs_grad):
        rows = 512 if x.device.type == "cpu" else 8192  # tokens whose logits exist at a time
        w = weight.to(x.dtype)
        loss = torch.zeros((), device=x.device)
        dx, dw = torch.empty_like(x), None
        for i in range(0, len(x), rows):
            logits = x[i:i + rows] @ w.t()  # (rows, V)
            loss += kernel(logits, targets[i:i + rows]).sum()
            if needs_grad:
                dx[i:i + rows] = logits @ w
                part = logits.t() @ x[i:i + rows]
                dw = part if dw is None else dw.float().add_(part)
        count = (targets >= 0).sum()
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx * scale, dw.float().mul_(scale), None, None, None


# -------------------------------------------------------------------------------------------------------- the model


class SmolLM2Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SmolLM2(nn.Module):
    """The language model. Every matrix starts normal with std initializer_range, every norm at one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = SmolLM2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # tied: one matrix reads tokens and predicts them
        self.loss_kernel = softmax_minus_onehot
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, idx, targets=None, logits_to_keep=0, cache=None):
        """Logits (B, T, vocab_size) and, with targets, their mean cross-entropy in nats a token (else None).

        idx: (B, T) token ids; targets: (B, T) the ids that follow, -100 where none counts. logits_to_keep as in
        Hugging Face: 0 keeps all positions, n the last n; None none at all, which makes the loss cheap.
        Raises ValueError for more positions than the model has."""
        T, limit = idx.size(1), self.config.max_position_embeddings
        if T > limit:
            raise ValueError(f"{T} positions, but the model has {limit} (max_position_embeddings)")
        x = self.model.embed_tokens(idx)  # (B, T, hidden_size)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream, too, in half the bytes
        cos, sin = rotary_table(torch.arange(T, device=x.device), self.config)
        # A prompt goes by what may be compiled: its length is new each time.
        x = self.run_layers(x, cos, sin) if cache is None else SmolLM2.run_layers(self, x, cos, sin, cache)
        logits = loss = None
        if logits_to_keep is not None:
            logits = self.lm_head(x[:, -logits_to_keep:])
        if targets is not None and logits is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets[:, -logits_to_keep:].flatten())
        elif targets is not None:
            loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_kernel,
                                            torch.is_grad_enabled())
        return logits, loss

    def run_layers(self, x, cos, sin, cache=None):
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin) if cache is None else layer.forward(x, cos, sin, cache.keeper(i))
        return self.model.norm(x)

    def compile_for_training(self, tokens=None):
        """Compiles in place what pays; the state dict stays as it is.

        tokens: of a step that is one forward and one backward pass. With few, a GPU would wait for its kernels' launches
        and gets CUDA graphs; they do not bear a second pass, since the gradients lie in memory that it would write.
        The embedding and the head stay outside: a compiled embedding adds its gradients in no fixed order."""
        device = next(self.parameters()).device.type
        if device == "cpu":
            for layer in self.model.layers:  # one layer is compiled and serves all: seconds instead of minutes
                layer.compile()
        else:
            graphs = device == "cuda" and tokens is not None and tokens <= 8192
            self.run_layers = torch.compile(self.run_layers, mode="reduce-overhead" if graphs else None)
        self.loss_kernel = torch.compile(softmax_minus_onehot)

    def flops_per_token(self, T, causal=False):
        """Training FLOPs per token at sequence length T: 6 N + 12 L H Q T, after Chowdhery et al. 2022 (PaLM, app. B).

        causal: count only the half of the attention that a causal mask leaves."""
        c = self.config
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T
        return 6 * sum(p.numel() for p in self.parameters()) + attention // (2 if causal else 1)


# ------------------------------------------------------------------------------------------------------- generation


BLOCK = 64  # positions in a block of the cache


class KVCache:
    """Keys and values of all layers, in blocks of positions, so that many can be read at once and none in vain.

    keys: of each layer (blocks, B * H_kv, head_dim, BLOCK); values: of each layer (blocks, B * H_kv, BLOCK, head_dim).
    Each a tensor of its own: thirty views of one that a compiled step writes to take torch seconds to tell apart."""

    def __init__(self, config, B, size, device, dtype):
        self.blocks = max(2, -(-size // BLOCK))  # what is compiled would take a size of 1 for a constant
        H, D, L = B * config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        self.keys, self.values = ([torch.zeros(self.blocks, H, *shape, device=device, dtype=dtype) for _ in range(L)]
                                  for shape in [(D, BLOCK), (BLOCK, D)])
        self.rotary = rotary_table(torch.arange(size, device=device), config)

    def keeper(self, i):
        """The function that puts a prompt's keys and values (B, H_kv, T, head_dim) of layer i into the cache."""
        def keep(k, v):
            rest = self.blocks * BLOCK - k.size(2)
            k, v = (F.pad(t, (0, 0, 0, rest)).flatten(0, 1).unflatten(1, (-1, BLOCK)).transpose(0, 1) for t in (k, v))
            self.keys[i].copy_(k.transpose(2, 3))
            self.values[i].copy_(v)
        return keep


def product(x, weight):
    """x @ weight.T in fp32 for few rows x (B, in_features). Compiled for one row, it runs at the memory's speed."""
    if len(x) == 1 and torch.compiler.is_compiling():
        return (x * weight.float()).sum(-1)[None]  # F.linear reaches a third of that on a CPU, and takes part in no fusion
    return F.linear(x.to(weight.dtype), weight).float()


def decode_attention(q, k, v, position):
    """Of one query, q (H, G, D), over the keys k (blocks, H, D, BLOCK) and values v (blocks, H, BLOCK, D) up to `position`.

    All cores work, a block each, and no key is read twice."""
    k, v = k.float(), v.float()
    scores = torch.stack([(q[:, g, :, None] * k).sum(2) for g in range(q.size(1))], dim=2)  # (blocks, H, G, BLOCK)
    places = torch.arange(k.size(0) * BLOCK, device=q.device).view(-1, 1, 1, BLOCK)
    scores = torch.where(places <= position, scores * q.size(2)**-0.5, -1e30)
    p = torch.exp(scores - scores.amax((0, 3), keepdim=True))
    y = torch.stack([(p[:, :, g, :, None] * v).sum(2) for g in range(q.size(1))], dim=2)  # (blocks, H, G, D)
    return (y * (1.0 / p.sum((0, 3)))[..., None]).sum(0)


def decode_weights(layer):
    """What decode_layer reads, as plain tensors: to look them up in modules takes 5 % of a token. q, k and v become one."""
    attn, mlp = layer.self_attn, layer.mlp
    modules = attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.input_layernorm, layer.post_attention_layernorm
    return torch.cat([m.weight for m in (attn.q_proj, attn.k_proj, attn.v_proj)]), *(m.weight for m in modules)


def decode_layer(weights, eps, x, cos, sin, position, keys, values):
    """DecoderLayer for one new token a row, x (B, hidden_size) fp32, at `position`, a tensor; writes its key and value."""
    qkv_proj, o_proj, gate_proj, up_proj, down_proj, input_norm, post_attention_norm = weights
    B, (_, H, D, _) = len(x), keys.shape
    qkv = product(F.rms_norm(x, x.shape[1:], input_norm.float(), eps), qkv_proj).view(B, -1, D)
    qk, v = qkv.tensor_split([-(H // B)], dim=1)
    q, k = apply_rotary(qk, cos, sin).tensor_split([-(H // B)], dim=1)
    block, i = position // BLOCK, position % BLOCK
    keys[block, :, :, i] = k.reshape(1, H, D).to(keys.dtype)
    values[block, :, i] = v.reshape(1, H, D).to(values.dtype)
    y = decode_attention(q.reshape(H, -1, D), keys, values, position)
    x = x + product(y.view(B, -1), o_proj)
    h = F.rms_norm(x, x.shape[1:], post_attention_norm.float(), eps)
    return x + product(F.silu(product(h, gate_proj)) * product(h, up_proj), down_proj)


def decode_head(norm, lm_head, eps, x):
    return product(F.rms_norm(x, x.shape[1:], norm.float(), eps), lm_head)


decode_region = torch.compiler.nested_compile_region(decode_layer)  # within a compiled step: compiled once, called for all


def decode_step(layer, head, layers, norm, embed_tokens, eps, rotary, idx, position):
    """Logits (B, vocab_size), fp32, after the tokens idx (B,) at `position`. layers: weights, keys and values of each."""
    x, (cos, sin) = F.embedding(idx, embed_tokens).float(), [t.index_select(0, position) for t in rotary]
    for weights, keys, values in layers:
        x = layer(weights, eps, x, cos, sin, position, keys, values)
    return head(norm, embed_tokens, eps, x)


def sample_token(logits, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """Draws the next ids (B,) from logits (B, V); seen: (B, T), the ids so far. temperature 0 takes the likeliest.

    top_k: among the k likeliest (0: all). top_p: among the likeliest that together have this probability (Holtzman et
    al. 2020, arXiv:1904.09751). repetition_penalty: Keskar et al. 2019 (arXiv:1909.05858), 1 for none."""
    logits = logits.float()
    if repetition_penalty != 1.0:
        past = logits.gather(1, seen)
        logits = logits.scatter(1, seen, torch.where(past > 0, past / repetition_penalty, past * repetition_penalty))
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits.topk(top_k or logits.size(1)) if top_k or top_p < 1 else (logits, None)
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # keeps the one that crosses the line
    # The largest p / Exp(1) falls on each index with its probability: multinomial, without its sum and search.
    choice = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


# A token takes 8 ms on a CPU, so small things count: no checks of sizes that cannot change, and x * y + z rounded once.
DECODE_OPTIONS = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}


@torch.inference_mode()
def generate(model, idx, max_new_tokens, compile=None, **sampling):
    """Yields the next ids (B,), max_new_tokens times, after the prompt idx (B, T). sampling: see sample_token.

    compile: "layer" or, for very long texts on a CPU, "step": 1.5 s more of compiling, 0.7 ms a token less.
    Raises ValueError where the prompt and the new tokens do not fit into the model's positions: nothing slides."""
    B, T = idx.shape
    limit, on_cuda = model.config.max_position_embeddings, idx.device.type == "cuda"
    if T + max_new_tokens > limit:
        raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones do not fit into the model's {limit} "
                         "positions: ask for fewer, or shorten the prompt")
    weights, eps = [decode_weights(layer) for layer in model.model.layers], model.config.rms_norm_eps
    cache = KVCache(model.config, B, T + max_new_tokens, idx.device, model.lm_head.weight.dtype)
    layer, head, step = decode_layer, decode_head, decode_step
    if compile == "layer":
        layer, head = (torch.compile(f, options=DECODE_OPTIONS) for f in (layer, head))
    elif compile == "step":  # (sizes that torch makes dynamic by itself break its reuse of the region)
        layer, step = decode_region, torch.compile(step, dynamic=False, options=DECODE_OPTIONS)
    logits, seen = model(idx, logits_to_keep=1, cache=cache)[0][:, -1], idx
    for n in range(T, T + max_new_tokens):
        new = sample_token(logits, seen, **sampling)
        yield new
        if n + 1 == T + max_new_tokens:
            return
        seen, position = torch.cat((seen, new[:, None]), dim=1), idx.new_tensor([n])
        if n == T or n % BLOCK == 0 and not on_cuda:  # with CUDA all blocks are read: a graph is captured once, as it is
            blocks = cache.blocks if on_cuda else max(2, n // BLOCK + 1)
            layers = [(w, k[:blocks], v[:blocks]) for w, k, v in zip(weights, cache.keys, cache.values)]
            for t in (*cache.rotary, *(t for _, *kv in layers for t in kv)) if compile else ():
                torch._dynamo.mark_dynamic(t, 0)  # what is compiled serves any number of blocks
            run = partial(step, layer, head, layers, model.model.norm.weight, model.lm_head.weight, eps, cache.rotary)
            if compile and on_cuda:  # one CUDA graph: to launch a token's kernels one by one takes longer than they do
                run = torch.cuda.make_graphed_callables(run, (new.clone(), position.clone()))
        # The first step has shown that what was compiled fits: it need not check that at every token.
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if compile and n > T else nullcontext():
            logits = run(new, position)


# ------------------------------------------------------------------------------- weights in Hugging Face's format


def config_from_hf(hf):
    """The SmolLM2Config of a Hugging Face config.json (a dict). Raises ValueError, naming what this model is not."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 writes the first
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                "tie_word_embeddings": True, "rope_type": "default", "partial_rotary_factor": 1.0}
    found = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
             "partial_rotary_factor": 1.0, **hf, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    wrong = [f"{key} = {found.get(key)!r} (only {value!r})" for key, value in expected.items() if found.get(key) != value]
    missing = [f.name for f in fields(SmolLM2Config) if f.name.endswith("size") or f.name.startswith("num_")]
    wrong += [f"{key} is missing" for key in missing if not isinstance(hf.get(key), int) and key != "num_key_value_heads"]
    if not wrong and hf.get("head_dim") not in (None, hf["hidden_size"] // hf["num_attention_heads"]):
        wrong = [f"head_dim = {hf['head_dim']!r} (only hidden_size / num_attention_heads)"]
    if wrong:
        raise ValueError("its config.json is not supported here: " + "; ".join(wrong))
    hf = {"num_key_value_heads": hf["num_attention_heads"], "rope_theta": rope.get("rope_theta", 10_000.0), **hf}
    return SmolLM2Config(**{f.name: hf[f.name] for f in fields(SmolLM2Config) if hf.get(f.name) is not None})


def from_pretrained(source):
    """Loads a model (fp32, CPU) from a folder in Hugging Face's format, or from the hub by its name (USER/NAME).

    Weights come from safetensors alone, which cannot carry code. Raises ValueError for what is missing or different.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    folder = source
    if not os.path.isdir(source):
        try:
            folder = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"])
        except Exception as e:
            raise ValueError(f"{source} is no folder, and the hub did not give it ({type(e).__name__})") from e
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = config_from_hf(json.load(f))
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        state = {key: value for name in files for key, value in load_file(os.path.join(folder, name)).items()}
    except Exception as e:
        raise ValueError(f"cannot load {source}: {e}") from e
    state.pop("lm_head.weight", None)  # tied: some files carry it twice
    with torch.device("meta"):
        model = SmolLM2(config)
    wanted = {key: value.shape for key, value in model.state_dict().items() if key != "lm_head.weight"}
    if wanted != {key: value.shape for key, value in state.items()}:
        odd = sorted(wanted.keys() ^ state.keys()) or [k for k in wanted if wanted[k] != state[k].shape]
        raise ValueError(f"the weights in {source} do not fit its config.json: {odd[0]} and {len(odd) - 1} more")
    model = model.to_empty(device="cpu")
    model.lm_head.weight = model.model.embed_tokens.weight  # to_empty makes two of them
    model.load_state_dict(state, strict=False)
    return model


def save_pretrained(model, folder, dtype=torch.float32, **extra):
    """Writes model.safetensors and config.json as transformers' LlamaForCausalLM reads them; extra: more fields."""
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    state = {key: p.detach().to("cpu", dtype).contiguous() for key, p in model.named_parameters()}  # tied: once
    save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
              "mlp_bias": False, "tie_word_embeddings": True, "head_dim": model.config.head_dim,
              "torch_dtype": str(dtype).removeprefix("torch."), **asdict(model.config), **extra}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


def main():
    config = SmolLM2Config()
    model = SmolLM2(config)
    print(model)
    sizes = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        component = "norms" if "norm" in name else parts[-3] if "layers" in name else parts[-2]
        sizes[component] = sizes.get(component, 0) + p.numel()
    total = sum(sizes.values())
    print(f"\n{'component':<14}{'parameters':>13}{'share':>9}")
    for component, n in [*sizes.items(), ("total", total)]:
        print(f"{component:<14}{n:>13,}{n / total:>9.2%}")
    print(f"\nTraining FLOPs after Chowdhery et al. 2022 (PaLM): 6 N + 12 L H Q T a token; causal: half the attention.\n"
          f"{'batch':>10}{'a token':>12}{'causal':>12}{'a step':>12}{'causal':>12}")
    for B, T in [(4, 256), (8, 1024), (16, 2048)]:
        full, causal = model.flops_per_token(T), model.flops_per_token(T, causal=True)
        print(f"{B:>3} x {T:>4}{full / 1e9:>9.3f} GF{causal / 1e9:>9.3f} GF{full * B * T / 1e12:>9.3f} TF"
              f"{causal * B * T / 1e12:>9.3f} TF")


if __name__ == "__main__":
    main()
