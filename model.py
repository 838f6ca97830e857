"""SmolLM2-135M in one file: the Llama architecture, its loss, generation with a key/value cache.

    python model.py            # the module tree, and how many parameters it has

Modules, parameters and config fields carry Hugging Face's names: weights go in and out as they are.
Sizes: Allal et al. 2025, "SmolLM2" (arXiv:2502.02737), and the published config.json.
In shapes: B texts, T tokens, H query heads, H_kv key heads, G = H / H_kv, D = head_dim, V ids.
"""
import ctypes
import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


def key(default, help, choices=None):
    """A field of a config: its default, its line of help, the values it may have (None: any)."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class SmolLM2Config:
    vocab_size: int = key(49152, "rows of the embedding, which is also the head")
    hidden_size: int = key(576, "width of the residual stream")
    intermediate_size: int = key(1536, "width inside the MLP")
    num_hidden_layers: int = key(30, "decoder layers")
    num_attention_heads: int = key(9, "query heads")
    num_key_value_heads: int = key(3, "key and value heads, each shared by several query heads")
    max_position_embeddings: int = key(8192, "longest text, in tokens")
    rope_theta: float = key(100_000.0, "base of the rotary wavelengths")
    rms_norm_eps: float = key(1e-5, "added to the mean square")
    initializer_range: float = key(576**-0.5, "std of the initial weights; 1/24: first loss 11.3")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


PAGE = 64  # positions in a page of the key/value cache
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # USER/NAME, and no path of a folder


class Linear(nn.Module):
    """nn.Linear without a bias and without random numbers, which SmolLM2 draws once for all.

    What changes here (a bias, say) has to change in linears, too."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        if torch.compiler.is_compiling() and x.numel() == x.size(-1):
            # A single row, as in decoding one text: on a CPU this reads the weights up to twice as
            # fast as F.linear.
            return (x[..., None, :] * self.weight.float()).sum(-1).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype))  # (under autocast they differ)


def linears(x, *layers):
    """The outputs of several layers on one x (B, T, in_features): for Linears one product."""
    # One token: a concatenation would copy all weights for it. No Linear: an adapter, say.
    if x.size(1) == 1 or any(type(layer) is not Linear for layer in layers):
        return [layer(x) for layer in layers]
    # Compiled in bf16, torch.cat is fused with the cast of the weights: it is free.
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight.to(x.dtype)).split([len(layer.weight) for layer in layers], -1)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, reduced in fp32. Zhang & Sennrich 2019 (arXiv:1910.07467)."""

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype)


def rotary_table(T, config, device):
    """cos and sin (T, D / 2), fp32, of T positions. Su et al. 2021 (arXiv:2104.09864).

    Raises ValueError for more positions than the model has."""
    if T > config.max_position_embeddings:
        raise ValueError(f"{T} tokens do not fit the {config.max_position_embeddings} positions of "
                         "max_position_embeddings: shorten the prompt, or ask for fewer new ones")
    exponents = torch.arange(0.0, config.head_dim, 2, device=device) / config.head_dim
    angles = torch.outer(torch.arange(0.0, T, device=device), 1.0 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """Rotates x (..., D) by its positions; its two halves form the pairs, as in Hugging Face."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def attention(q, k, v):
    """Causal attention (B, H, T, D) of q (B, H, T, D) over k and v (B, H_kv, T, D).

    A change belongs in cpu_attention, which it is compiled on a CPU, and cached_attention, too."""
    if q.is_cpu and torch.compiler.is_compiling():
        return cpu_attention(q, k, v)
    # Flash attention, which GPUs that get bf16 have (pick_device), reads a key head that several
    # query heads share without copying it. Elsewhere on CUDA enable_gqa would fall to a kernel that
    # stores T x T scores; on MPS it aborts the process.
    shared = q.dtype == torch.bfloat16 and not q.is_mps
    if not shared:
        k, v = [t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v)]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


def cpu_attention(q, k, v):
    """attention as two batched products around a fused softmax: faster than the flash kernel.

    Blocks of C queries skip the keys after them, and the probabilities are made again in the
    backward pass, so that what is kept for it does not grow with T * T."""
    T, D = q.shape[2:]
    C = max(256, math.ceil(T / 4))

    def attend(q, k, v, start):
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k)
        future = torch.full(scores.shape[-2:], -math.inf).triu(start + 1)
        probs = (scores.float() * D**-0.5 + future).softmax(-1).to(v.dtype)
        return torch.einsum("bhgqk,bhkd->bhgqd", probs, v)

    q, outputs = q.unflatten(1, (k.size(1), -1)), []  # (B, H_kv, G, T, D): G heads share a key head
    for i in range(0, T, C):
        outputs.append(checkpoint(attend, q[:, :, :, i:i + C], k[:, :, :i + C], v[:, :, :i + C], i,
                                  use_reentrant=False))
    return torch.cat(outputs, 3).flatten(1, 2)


def cached_attention(q, keys, values, position):
    """Attention of one token, q (B, H, 1, D), over a layer's cache up to `position`, a tensor (1,).

    keys: (pages, B * H_kv, D, PAGE); values: (pages, B * H_kv, PAGE, D). Compiled, the cores share
    the pages, and no key is read twice."""
    x = q.view(keys.size(1), -1, q.size(-1)).float()  # (B * H_kv, G, D): G heads share a key head
    k, v, heads = keys.float(), values.float(), range(x.size(1))
    scores = torch.stack([(x[:, g, :, None] * k).sum(2) for g in heads], dim=2) * x.size(2)**-0.5
    positions = torch.arange(k.size(0) * PAGE, device=q.device).view(-1, 1, 1, PAGE)
    scores = torch.where(positions <= position, scores, -1e30)  # (pages, B * H_kv, G, PAGE)
    p = torch.exp(scores - scores.amax((0, 3), keepdim=True))
    y = torch.stack([(p[:, :, g, :, None] * v).sum(2) for g in heads], dim=2)  # (..., G, D)
    return (y * (1.0 / p.sum((0, 3)))[..., None]).sum(0).view(q.shape)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(size, size)  # H * D is as much
        self.k_proj = Linear(size, kv_size)
        self.v_proj = Linear(size, kv_size)
        self.o_proj = Linear(size, size)

    def forward(self, x, rotary, cache=None):
        """x: (B, T, hidden_size). cache: keys, values, the positions (T,) at which x joins them."""
        B, T, _ = x.shape
        qkv = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = [t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in qkv]  # (B, H, T, D)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache:
            keys, values, positions = cache
            page, i = positions // PAGE, positions % PAGE
            # Index tensors around slices put their own dimension first: (T, B * H_kv, D)
            keys[page, :, :, i] = k.flatten(0, 1).transpose(0, 1).to(keys.dtype)
            values[page, :, i] = v.flatten(0, 1).transpose(0, 1).to(values.dtype)
        if cache and T == 1:
            y = cached_attention(q, *cache).to(x.dtype)
        else:
            y = attention(q, k, v)  # (of a prompt: nothing is cached before it)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU. Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def cross_entropy_and_gradient(logits, targets):
    """The cross-entropies (N,), fp32; overwrites logits (N, V) by their gradients. 0 if ignored."""
    z = logits.float()
    logz = torch.logsumexp(z, dim=-1, keepdim=True)
    onehot = torch.arange(z.size(1), device=z.device) == targets[:, None]
    valid = targets[:, None] >= 0
    losses = torch.where(valid, logz - torch.where(onehot, z, 0.0).sum(-1, keepdim=True), 0.0)
    logits.copy_(torch.where(valid, torch.exp(z - logz) - onehot.float(), 0.0))
    return losses.squeeze(1)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, in chunks of rows to bound the memory.

    The gradient of the logits is softmax - onehot, known as soon as they are: the forward pass
    writes it over them, and two matrix products make both gradients of it.
    x: (N, hidden_size); weight: (V, hidden_size); targets: (N,), -100 where ignored."""

    @staticmethod
    def forward(ctx, x, weight, targets, kernel):
        rows = 1024 if x.is_cpu else 8192  # tokens whose logits exist at a time
        w = weight.to(x.dtype)
        loss, dx, dw = 0.0, torch.empty_like(x), None
        for i in range(0, len(x), rows):
            logits = x[i:i + rows] @ w.t()  # (rows, V)
            loss += kernel(logits, targets[i:i + rows]).sum()  # logits now hold their gradients
            if ctx.needs_input_grad[0]:  # (in no_grad the weight's is still True)
                dx[i:i + rows] = logits @ w
                dw_of_rows = logits.t() @ x[i:i + rows]  # (V, hidden_size)
                dw = dw_of_rows.float() if dw is None else dw.add_(dw_of_rows)
        count = (targets >= 0).sum()
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx * scale, dw.mul_(scale), None, None


class SmolLM2(nn.Module):
    """The language model. Matrices start normal with std initializer_range, norms at one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Linear(config.hidden_size, config.vocab_size),  # (it is the head, too)
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = self.model.embed_tokens  # tied: one matrix reads and predicts
        self.loss_kernel = cross_entropy_and_gradient
        for p in self.parameters():
            if p.dim() >= 2 and not p.is_meta:  # also what a layer had set (on meta it is slow)
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, idx, targets=None):
        """(logits (B, T, V), None); with targets (None, their mean cross-entropy in nats a token).

        idx: (B, T) token ids; targets: (B, T) the ids that follow, -100 where none counts."""
        rotary = rotary_table(idx.size(1), self.config, idx.device)
        x = self.run_layers(self.embed(idx), rotary)
        if targets is None:
            return self.lm_head(x), None
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight,
                                              targets.flatten(), self.loss_kernel)

    def embed(self, idx):
        """The residual stream's start, (B, T, hidden_size); all of it is in autocast's dtype."""
        x = F.embedding(idx, self.model.embed_tokens.weight)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def run_layers(self, x, rotary):
        """Training's way through the layers; generate has its own, with a cache."""
        for layer in self.model.layers:
            x = layer(x, rotary)
        return self.model.norm(x)

    def next_logits(self, x):
        """The logits (B, V) of the token after x (B, T, hidden_size), the last layer's output."""
        return self.lm_head(self.model.norm(x[:, -1]))

    def compile_for_training(self, tokens):
        """Compiles in place what gains by it; the state dict stays as it is.

        tokens: of a step, or 0 if it takes several passes. With few a GPU would wait for launches
        of kernels: CUDA graphs spare these (in a second pass they would write over the gradients of
        the first). A compiled embedding would sum its gradient in no fixed order."""
        weight = self.lm_head.weight
        if weight.is_cpu:
            for layer in self.model.layers:  # one is compiled and serves all: seconds, not minutes
                layer.compile()
        else:
            mode = "reduce-overhead" if weight.is_cuda and 0 < tokens <= 8192 else None
            self.run_layers = torch.compile(self.run_layers, mode=mode)
        # For each number of rows one kernel: whichever came first, a resume has the same.
        self.loss_kernel = torch.compile(cross_entropy_and_gradient, dynamic=False)


# A token takes 8 ms on a CPU, so small things count: sizes that cannot change are not checked, and
# x * y + z is rounded once.
DECODE_OPTIONS = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}
# of attention: without cuDNN's, which plans up to 1 s for each length of a prompt
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draws the next ids (B,) from logits (B, V). temperature 0 takes the likeliest.

    top_k: among the k likeliest (0: all). top_p: among the likeliest that together have this
    probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    logits = logits.float()
    if temperature < 1e-30:  # fp32 would divide by 0
        return logits.argmax(-1)
    V = logits.size(1)
    logits, ids = logits.topk(min(top_k or V, V))  # sorted, the likeliest first
    probs = torch.softmax((logits - logits[:, :1]) / temperature, dim=-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before > top_p, 0.0)  # keeps the one that crosses the line
    choice = torch.multinomial(probs, 1, generator=generator)
    return ids.gather(1, choice).squeeze(1)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, compile=False, **sampling):
    """Yields the next ids (B,), max_new_tokens times, after the prompt idx (B, T).

    compile: see worth_compiling. sampling: see sample_token. Raises ValueError where prompt and
    new tokens exceed the model's positions: nothing slides.

    Each layer's keys and values are cached in pages of positions (see cached_attention): only those
    in use are read (by a CUDA graph all), in parallel."""
    (B, T), config = idx.shape, model.config
    size, D, zeros = T + max_new_tokens, config.head_dim, model.lm_head.weight.new_zeros
    cos, sin = rotary_table(size, config, idx.device)
    shape = math.ceil(size / PAGE) + 1, B * config.num_key_value_heads
    caches = [(zeros(*shape, D, PAGE), zeros(*shape, PAGE, D)) for _ in model.model.layers]
    of_prompt = of_token = type(model.model.layers[0]).forward, type(model).next_logits
    if compile:  # (unbound, so that one serves all layers; a prompt's length is new each time)
        of_token = [torch.compile(function, options=DECODE_OPTIONS) for function in of_prompt]

    def read(idx, positions):
        """The logits (B, V) after the tokens idx (B, T) at positions (T,), which join the cache."""
        run_layer, next_logits = of_prompt if idx.size(1) > 1 else of_token
        x = model.embed(idx)
        is_emulated = idx.size(1) > 1 and idx.is_cpu and not cpu_has_bf16()
        if is_emulated or compile and idx.numel() == 1:
            x = x.float()  # products of many rows are then faster, and of one as fast
        rotary = cos[positions], sin[positions]  # (T, D / 2)
        for layer, cache in zip(model.model.layers, in_use):
            x = run_layer(layer, x, rotary, (*cache, positions))
        return next_logits(model, x)

    n, first = 0, T if T > 1 else 0  # tokens in the cache; n when one is first read by itself
    for _ in range(max_new_tokens):
        T = idx.size(1)  # the prompt's, then 1
        positions = torch.arange(n, n + T, device=idx.device)
        if n % PAGE == 0:
            used = size if idx.is_cuda else n + T  # (a CUDA graph reads what its capture read)
            pages = max(2, math.ceil(used / PAGE))  # (compiled, a size of 1 would be a constant)
            in_use = [(keys[:pages], values[:pages]) for keys, values in caches]
        if n == first and compile:
            for cache in in_use:
                for tensor in cache:  # compiled once, for any number of pages
                    torch._dynamo.mark_dynamic(tensor, 0)
        if n == first and idx.is_cuda:  # 1,850 launches outlast the work of a token
            torch.cuda.set_device(idx.device)  # what is captured are the current one's streams
            with torch.autocast("cuda", enabled=False):  # on in train.py, not to be captured
                read = torch.cuda.make_graphed_callables(read, (idx.clone(), positions))
        # What fits the first token fits the rest: the guards are not checked again at each.
        unchecked = torch.compiler.set_stance(skip_guard_eval_unsafe=compile and n > first)
        with unchecked, sdpa_kernel(KERNELS):
            logits = read(idx, positions)
        new = sample_token(logits, **sampling)
        yield new
        idx, n = new[:, None], n + T


def config_from_hf(hf):
    """The SmolLM2Config of a config.json, a dict, with LlamaConfig's defaults for all but sizes.

    Raises ValueError, naming what this model does not have."""
    given = {name: value for name, value in hf.items() if value is not None}
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}  # (version 5: the first)
    heads = given.get("num_attention_heads", 1)
    found = {"tie_word_embeddings": False, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
             "max_position_embeddings": 2048, "num_key_value_heads": heads,
             "rope_theta": 10_000.0, **rope, **given}
    required = {"model_type": "llama", "tie_word_embeddings": True, "hidden_act": "silu",
                "rope_type": "default", "type": "default",  # (the older name of the same)
                "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False,
                "head_dim": given.get("hidden_size", 0) // heads}
    wrong = [f"{name} = {found[name]!r} (only {value!r})"
             for name, value in required.items() if found.get(name, value) != value]
    kinds = SmolLM2Config.__annotations__
    wrong += [f"{name} is missing" for name in kinds if name not in found]
    if wrong:
        raise ValueError("not supported in config.json: " + "; ".join(wrong))
    return SmolLM2Config(**{name: kind(found[name]) for name, kind in kinds.items()})


def model_of(config, weights):
    """The model that has these weights, in eval mode. Raises for other names or shapes."""
    with torch.device("meta"):
        model = SmolLM2(config)
    model.load_state_dict(dict(weights), assign=True)  # (a copy: torch writes "assign" in it)
    return model.eval()


def from_pretrained(source):
    """Loads a model (fp32, CPU) from a folder in Hugging Face's format, or the hub by USER/NAME.

    Weights come from safetensors alone, which cannot carry code. Raises ValueError, in one line."""
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder, state = Path(source), {}
    try:
        if re.fullmatch(HUB_NAME, str(source)) and not folder.parent.exists():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        config = config_from_hf(json.loads((folder / "config.json").read_bytes()))
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        state["lm_head.weight"] = state.get("model.embed_tokens.weight")  # in most files once
        return model_of(config, state).float()
    except Exception as e:
        raise ValueError(f"cannot load {source}: {' '.join(str(e).split()):.300}")


def cpu_has_bf16():
    """Whether the processor multiplies faster in bf16 than in fp32.

    Emulated, it takes several times as long; by Intel's AVX-512, where AMX is missing, twice.
    Apple's have bf16, and torch there no oneDNN that would use it."""
    has = torch.cpu.get_capabilities()
    slow = "Intel" in repr(has) and "avx512_bf16"
    return torch.backends.mkldnn.is_available() and any(
        has[name] for name in has if "bf16" in name and name != slow)


def pick_device(device="auto", dtype="auto", decoding=False):
    """(torch.device, torch.dtype, the reason for that dtype). "cuda" is this process's own GPU.

    decoding: of single tokens, which waits for the weights' bytes: bf16 on any CPU.
    Raises ValueError where there is no such device."""
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu")
                      if torch.get_device_module(name).is_available())
    if device == "cuda":
        device = "cuda:" + os.environ.get("LOCAL_RANK", "0")
    try:
        torch.zeros(1, device=device).item()
    except Exception as e:
        raise ValueError(f"device = {device!r} is not available here: {e}")
    device = torch.device(device)
    if dtype != "auto":
        return device, getattr(torch, dtype), "as asked"
    native, fallback = device.type == "cpu" and (decoding or cpu_has_bf16()), torch.float32
    if device.type == "cuda":
        native, fallback = torch.cuda.get_device_capability(device) >= (8, 0), torch.float16
    if native:
        return device, torch.bfloat16, "native"
    return device, fallback, "no fast bf16"


@lru_cache
def compiler_problem(device):
    """Why compiling does not work on this device, in one line; None if it does."""
    from torch._inductor import config
    x = torch.eye(64, device=device)
    if x.is_mps:
        return "a prototype on MPS"
    inputs = x.half().t(), *x.chunk(2, 1)
    config.cpp.vec_isa_ok = True  # trust the processor: trying each instruction set takes seconds
    for bits in None, 256:  # None: the widest; in 512, g++ 12 errs for processors it does not know
        config.cpp.simdlen = bits
        try:
            torch._dynamo.reset()
            rotated = torch.compile(apply_rotary)(*inputs)
            if x.is_cpu:  # (a GPU's kernels are not the C++ compiler's)
                torch.testing.assert_close(rotated, apply_rotary(*inputs))
            return None
        except Exception as e:  # without a compiler, all still works
            problem = f"{type(e).__name__}: {' '.join(str(e).split('Output:')[-1].split()):.80}"
    return problem


def worth_compiling(device, max_new_tokens):
    """True where so many tokens win back the seconds that generate(compile=True) takes first."""
    enough = 100 if device.type == "cpu" else 1000
    return max_new_tokens >= enough and not compiler_problem(device)


def is_out_of_memory(error):
    """Whether an error says that memory ran out; on a CPU it is a RuntimeError."""
    return isinstance(error, MemoryError) or re.search(
        "(?i)allocate memory|bad_alloc|out of memory", str(error))


def keep_freed_memory():
    """Lets glibc keep what is freed, or each step gives hundreds of MB back and faults them in."""
    with suppress(Exception):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    model = SmolLM2(SmolLM2Config())
    print(f"{model}\n{sum(p.numel() for p in model.parameters()):,} parameters")
