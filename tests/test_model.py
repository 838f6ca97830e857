"""model.py: the published sizes, the numbers of transformers, and a cache that changes nothing."""
import copy
import json
import re
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from transformers import LlamaConfig, LlamaForCausalLM

import model as M
import train
from model import LinearCrossEntropy, SmolLM2, SmolLM2Config, generate, sample_token

SMALL = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
             initializer_range=0.15)


def small(**sizes):
    torch.manual_seed(0)
    return SmolLM2(SmolLM2Config(**{**SMALL, **sizes}))


def transformers_config(config):
    sizes = asdict(config)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    return LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=True,
                       attention_bias=False, mlp_bias=False, attn_implementation="eager")


def transformers_twin(ours):
    """transformers' model with the same weights."""
    theirs = LlamaForCausalLM(transformers_config(ours.config))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def save(ours, folder, **changes):
    """Writes Hugging Face's format by transformers, then changes config.json."""
    transformers_twin(ours).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def full_size():
    """(ours, theirs) at full size with the same random weights, fp32."""
    torch.manual_seed(0)
    ours = SmolLM2(SmolLM2Config())
    return ours, transformers_twin(ours)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def worst_gradient(model, expected):
    """(relative difference, name) of the parameter whose gradient differs most."""
    expected = dict(expected.named_parameters())
    assert len(expected) == len(list(model.parameters()))
    return max((relative(p.grad, expected[name].grad), name)
               for name, p in model.named_parameters())


def plain_loss(model, x, y):
    """The loss of whole logits in fp32."""
    return F.cross_entropy(model(x)[0].float().flatten(0, 1), y.flatten())


# ---------------------------------------------------------------------------------- the sizes


def test_it_has_134_515_008_parameters_with_the_names_and_shapes_of_transformers():
    with torch.device("meta"):
        ours, theirs = SmolLM2(SmolLM2Config()), LlamaForCausalLM(transformers_config(SmolLM2Config()))
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_config_with_more_fields_makes_the_same_model():
    @dataclass
    class Recipe(SmolLM2Config):
        learning_rate: float = 1e-3
    torch.manual_seed(0)
    ours, idx = SmolLM2(Recipe(**SMALL)), torch.randint(211, (1, 9))
    assert torch.equal(ours(idx)[0], small()(idx)[0])


def test_python_model_py_prints_the_table_and_the_flops():
    done = run_script("model.py")
    assert done.code == 0 and "DecoderLayer" in done.out, done.err
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d.]+)%$", done.out, re.M)
    counts = {name: int(n.replace(",", "")) for name, n, _ in rows}
    assert counts.pop("total") == sum(counts.values()) == 134_515_008
    assert counts["embed_tokens"] == 49152 * 576
    shares = [float(share) for name, _, share in rows if name != "total"]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    full, causal = (6 * 134_515_008 + 12 * 30 * 9 * 64 * 256 / part for part in (1, 2))
    line = next(line for line in done.out.splitlines() if line.split()[:3] == ["4", "x", "256"])
    assert [float(n) for n in re.findall(r"\d+\.\d+", line)] == pytest.approx(
        [full / 1e9, full * 1024 / 1e12, causal * 1024 / 1e12], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("initializer_range, expected", [(1 / 24, 11.3), (0.02, 10.95)])
def test_the_first_loss(initializer_range, expected, data_dir):
    torch.manual_seed(1337)
    ours = SmolLM2(SmolLM2Config(initializer_range=initializer_range))
    ids = np.fromfile(data_dir / "train.bin", dtype="<u2")[:4 * 257].astype(np.int64)
    ids = torch.from_numpy(ids).view(4, 257)
    with torch.no_grad():
        _, loss = ours(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(expected, abs=0.12)


def test_the_first_weights_are_normal_and_the_norms_one():
    for name, p in small(initializer_range=0.07).named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.07, rel=0.1) and abs(p.mean().item()) < 0.01, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


# --------------------------------------------------------------------- the same as transformers


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 512), (2, 600), (1, 1100)])
def test_logits_equal_transformers_at_full_size(full_size, shape):
    ours, theirs = full_size
    idx = torch.randint(49152, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, loss = ours(idx)
        expected = theirs(idx).logits
    assert logits.shape == (*shape, 49152) and loss is None
    assert (logits - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("sizes", [{}, dict(num_key_value_heads=6), dict(num_key_value_heads=1),
                                   dict(rope_theta=500.0, rms_norm_eps=1e-2)])
def test_logits_equal_transformers_at_other_sizes(sizes):
    ours = small(**sizes)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)  # a norm's weight of one would show neither its place nor its use
    theirs, idx = transformers_twin(ours), torch.randint(211, (2, 130))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max().item() < 1e-4


@pytest.mark.slow
def test_gradients_equal_transformers_at_full_size(full_size):
    ours, theirs = full_size
    ids = torch.randint(49152, (1, 513), generator=torch.Generator().manual_seed(2))
    x, y = ids[:, :-1], ids[:, 1:]
    logits, loss = ours(x, y)
    loss.backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    worst = worst_gradient(ours, theirs)
    for m in full_size:
        m.zero_grad(set_to_none=True)
    assert logits is None and worst[0] < 1e-4, worst


@pytest.mark.slow
def test_ten_adamw_steps_stay_within_1e_3_of_transformers_at_full_size(full_size):
    ours, theirs = (copy.deepcopy(m) for m in full_size)
    config = train.TrainConfig(learning_rate=3e-4)
    params = list(theirs.parameters())
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [train.make_optimizers(ours, config)["optimizer"],
                  torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))]
    losses = []
    for step in range(10):
        seed = torch.Generator().manual_seed(step % 2)  # two batches in turns, so that the loss falls
        ids = torch.randint(2000, (2, 49), generator=seed)
        x, y = ids[:, :-1], ids[:, 1:]
        pair = ours(x, y)[1], F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        for m, loss, optimizer in zip((ours, theirs), pair, optimizers):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append([loss.item() for loss in pair])
    assert all(abs(a - b) < 1e-3 for a, b in losses), losses
    assert losses[-1][0] < losses[0][0] - 0.5, losses  # or nothing was compared


# ------------------------------------------------------------- the loss, attention, the compiler


@pytest.mark.parametrize("N", [1, 512, 513, 1300])
def test_the_fused_loss_equals_cross_entropy_in_value_and_gradients(N):
    """On the CPU in fp32 a chunk has 512 rows: up to three of them here."""
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(N, 24, generator=generator)
    weight = torch.randn(301, 24, generator=generator)
    targets = torch.randint(301, (N,), generator=generator)
    if N > 1:
        targets[::7] = -100
    if N == 1300:
        targets[:520] = -100  # a chunk without any
    found, wanted = [], []
    for results, function in [
            (found, lambda x, w: LinearCrossEntropy.apply(x, w, targets, M.softmax_minus_onehot, True)),
            (wanted, lambda x, w: F.cross_entropy(x @ w.t(), targets, ignore_index=-100))]:
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(a, b)
        (3 * loss).backward()
        results += [loss.detach(), a.grad, b.grad]
    for name, f, w in zip(("loss", "dx", "dw"), found, wanted):
        assert torch.allclose(f, w, rtol=1e-4, atol=1e-6), (name, (f - w).abs().max())


def test_the_loss_of_bf16_logits_is_reduced_in_fp32():
    logits = 5 * torch.randn(40, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(40)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    assert torch.allclose(M.softmax_minus_onehot(logits.clone(), targets), expected, atol=1e-5)


def test_the_fused_loss_under_bf16_autocast_is_as_good_as_cross_entropy():
    ours, ids = small(max_position_embeddings=2560), torch.randint(211, (1, 2501))  # five chunks
    found = {}
    for way, loss_of, dtype in [("fused", lambda m, x, y: m(x, y)[1], torch.bfloat16),
                                ("plain", plain_loss, torch.bfloat16),
                                ("fp32", plain_loss, torch.float32)]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            assert ours.embed(ids).dtype == dtype
            loss = loss_of(ours, ids[:, :-1], ids[:, 1:])
        loss.backward()
        found[way] = loss.item(), torch.cat([p.grad.flatten() for p in ours.parameters()])
        ours.zero_grad(set_to_none=True)
    assert found["fused"][0] == pytest.approx(found["fp32"][0], abs=0.02)
    error = {way: relative(found[way][1], found["fp32"][1]) for way in ("fused", "plain")}
    assert error["fused"] < 1.2 * error["plain"] < 0.1


@pytest.mark.parametrize("T", [1, 5, 256, 257, 300, 1023, 1100])
def test_the_attention_of_the_compiled_cpu_path_is_attention(T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 8, generator=generator, requires_grad=True)
               for heads in (6, 2, 2))
    up = torch.randn(2, 6, T, 8, generator=generator)
    found = M.cpu_attention(q, k, v)
    wanted = F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1),
                                            is_causal=True)
    assert torch.allclose(found, wanted, atol=1e-5)
    for f, w in zip(torch.autograd.grad(found, (q, k, v), up), torch.autograd.grad(wanted, (q, k, v), up)):
        assert torch.allclose(f, w, atol=1e-4)


@pytest.mark.parametrize("device, capability, dtype, has", [
    ("cpu", None, torch.float32, True), ("mps", None, torch.float32, False),
    ("cuda", (7, 5), torch.float16, False), ("cuda", (8, 0), torch.float32, False),
    ("cuda", (8, 0), torch.bfloat16, True), ("cuda", (9, 0), torch.float16, True)])
def test_keys_are_repeated_where_no_kernel_shares_them(device, capability, dtype, has, monkeypatch):
    assert M.has_gqa_kernel(device, capability, dtype) == has
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = M.attention(q, k, v)
    heads = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **kw: (heads.append(k.size(1)), plain(q, k, v, **kw))[1])
    monkeypatch.setattr(M, "has_gqa_kernel", lambda *_: has)
    assert torch.allclose(M.attention(q, k, v), expected, atol=1e-6)
    assert heads == [2 if has else 6]


def need_compiler(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if problem := M.compiler_problem(torch.device(device)):
        pytest.skip(f"no compiler here: {problem}")


@pytest.mark.slow
@pytest.mark.parametrize("device, T", [("cpu", 256), ("cpu", 300), ("cpu", 1100), ("cuda", 256)])
def test_compiled_equals_eager(device, T):
    need_compiler(device)
    eager = small().to(device)
    compiled = copy.deepcopy(eager)
    compiled.compile_for_training(2 * T)
    assert list(compiled.state_dict()) == list(eager.state_dict())  # no _orig_mod.
    losses = []
    for m in (eager, compiled):
        for seed in range(3):  # CUDA graphs are recorded in the second pass, used from the third on
            ids = torch.randint(211, (2, T + 1), generator=torch.Generator().manual_seed(seed)).to(device)
            m.zero_grad(set_to_none=True)
            loss = m(ids[:, :-1], ids[:, 1:])[1]
            loss.backward()
        losses.append(loss.item())
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    worst = worst_gradient(compiled, eager)
    assert worst[0] < 1e-4, worst


# ---------------------------------------------------------------------------------- generation


def lively(m):
    """Fresh weights with tied embeddings mostly repeat the last token, whatever a cache does."""
    with torch.no_grad():
        for p in m.model.layers.parameters():
            if p.dim() == 2:
                p.normal_(std=1.5 * p.size(1)**-0.5)
        m.model.embed_tokens.weight.mul_(0.1)
    return m


def greedy_without_cache(m, idx, n):
    with torch.no_grad():
        for _ in range(n):
            idx = torch.cat((idx, m(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def greedy_with_cache(m, idx, n):
    new = torch.stack(list(generate(m, idx, n, temperature=0)), dim=1)
    return torch.cat((idx, new), dim=1)


@pytest.mark.parametrize("kv_heads, B, prompt_length, n", [
    (2, 2, 1, 400), (6, 1, 17, 320), (2, 1, 63, 40), (2, 1, 64, 40), (1, 3, 65, 80), (2, 1, 300, 40)])
def test_the_cache_changes_no_token_in_hundreds(kv_heads, B, prompt_length, n):
    m = lively(small(num_key_value_heads=kv_heads))
    prompt = torch.randint(211, (B, prompt_length))
    found = greedy_with_cache(m, prompt, n)
    assert torch.equal(found, greedy_without_cache(m, prompt, n))
    assert len(found[0].unique()) > 30  # a text that only repeats itself would prove nothing


@pytest.mark.slow
def test_the_cache_changes_no_token_at_full_size(full_size):
    m = lively(copy.deepcopy(full_size[0]))
    prompt = torch.randint(49152, (1, 20), generator=torch.Generator().manual_seed(3))
    found = greedy_with_cache(m, prompt, 40)
    assert torch.equal(found, greedy_without_cache(m, prompt, 40))
    assert len(found[0, 20:].unique()) > 10


@pytest.mark.parametrize("B, T, dtype, tolerance", [
    (1, 20, torch.float32, 1e-3), (3, 70, torch.float32, 1e-3), (2, 20, torch.bfloat16, 0.3)])
def test_the_logits_with_a_cache_are_those_without(B, T, dtype, tolerance, monkeypatch):
    m, logits = lively(small()).to(dtype), []
    ids = torch.randint(211, (B, T + 150))

    def next_of_ids(found, seen, **_):
        assert torch.equal(seen, ids[:, :seen.size(1)])
        logits.append(found.float())
        return ids[:, seen.size(1)]
    monkeypatch.setattr(M, "sample_token", next_of_ids)
    assert torch.equal(torch.stack(list(generate(m, ids[:, :T], 150)), dim=1), ids[:, T:])
    with torch.no_grad():
        expected = m.float()(ids)[0][:, T - 1:-1]
    error = (torch.stack(logits, dim=1) - expected).abs().max() / expected.std()
    assert error.item() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_generation_changes_no_token(device):
    """One text, two, another model: in turns, as each trusts what was compiled after its first step."""
    need_compiler(device)
    other = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = [lively(small(**changes)).to(device) for changes in ({}, {}, other)]
    prompts = [torch.randint(211, (B, 50), device=device) for B in (1, 2, 1)]
    streams = [generate(m, p, 250, compile=True, temperature=0) for m, p in zip(models, prompts)]
    texts = zip(*zip(*streams, strict=True))
    for m, prompt, tokens in zip(models, prompts, texts):
        found = torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1)
        assert torch.equal(found, greedy_without_cache(m, prompt, 250))
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_in_training_generates_and_stays_as_it_is(autocast):
    """Also under autocast, as the samples of a training do."""
    m, idx = small(), torch.randint(211, (1, 9))
    before = copy.deepcopy(m.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert len(list(generate(m, idx, 70))) == 70
        m(idx, idx)[1].backward()  # no inference tensor is left behind
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") == autocast
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_more_positions_than_the_model_has_are_a_clear_error():
    m = small(max_position_embeddings=32)
    with pytest.raises(ValueError, match="33 positions, but the model has 32"):
        m(torch.zeros(1, 33, dtype=torch.long))
    prompt = torch.zeros(1, 20, dtype=torch.long)
    with pytest.raises(ValueError, match="20 tokens and 13 new ones do not fit into the model's 32 "):
        next(generate(m, prompt, 13))
    assert len(list(generate(m, prompt, 12))) == 12
    assert list(generate(m, prompt, 0)) == []


# ------------------------------------------------------------------------------------ sampling


def draw(logits, n=4000, seen=(), **sampling):
    """n draws from logits (V,)."""
    seen = torch.tensor([seen] * n, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    return sample_token(logits.expand(n, -1).clone(), seen, generator=generator, **sampling)


@pytest.mark.parametrize("sampling", [
    {}, dict(temperature=0.5), dict(temperature=2.0), dict(top_k=6), dict(top_p=0.8),
    dict(top_k=7, top_p=0.7, temperature=1.5)])
def test_tokens_come_with_the_probabilities_of_the_softmax(sampling):
    """Chi-square against probabilities computed the long way."""
    logits, n = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(1)), 20_000
    probs = torch.softmax(logits.double() / sampling.get("temperature", 1.0), 0).tolist()
    order = sorted(range(12), key=lambda i: -probs[i])[:sampling.get("top_k", 12)]
    whole = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < sampling.get("top_p", 1.0):
            kept.append(i)
            mass += probs[i] / whole
    counts = torch.bincount(draw(logits, n, **sampling), minlength=12).tolist()
    assert {i for i, c in enumerate(counts) if c} <= set(kept)
    norm = sum(probs[i] for i in kept)
    chi2 = sum((counts[i] - n * probs[i] / norm)**2 / (n * probs[i] / norm) for i in kept)
    assert chi2 < 3 * len(kept) + 10, (chi2, counts)  # beyond the 99.9th percentile at these sizes


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-6),
                                      dict(temperature=1e-30)])
def test_greedy_and_nearly_greedy_take_the_likeliest(sampling):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert set(draw(logits, 200, **sampling).tolist()) == {logits.argmax().item()}


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    tokens = draw(logits, 20_000, seen=[0, 2, 0], repetition_penalty=1.5)
    expected = torch.softmax(torch.tensor([2.0 / 1.5, 1.5, -1.5, -1.2]), 0)  # seen twice counts once
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 20_000, expected, atol=0.015)
    assert draw(logits, 1, seen=[0], repetition_penalty=1.5, temperature=0).item() == 1


# ------------------------------------------------------------- weights in Hugging Face's format


def test_weights_come_from_transformers_to_the_bit(tmp_path):
    ours = small(rms_norm_eps=3e-4)
    save(ours, tmp_path)
    back = M.from_pretrained(str(tmp_path))
    assert back.config == ours.config
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in back.state_dict().items())
    assert back.lm_head.weight is back.model.embed_tokens.weight
    transformers_twin(ours).bfloat16().save_pretrained(tmp_path)
    half = M.from_pretrained(str(tmp_path))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert half.lm_head.weight is half.model.embed_tokens.weight


@pytest.mark.parametrize("rope", [{"rope_theta": 777.0},
                                  {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}])
def test_both_ways_to_write_the_rotary_base_are_read(rope):
    hf = {**SMALL, "model_type": "llama", "tie_word_embeddings": True, **rope}
    assert M.config_from_hf(hf).rope_theta == 777.0


def test_what_config_json_leaves_out_is_as_in_transformers():
    hf = {k: v for k, v in SMALL.items() if "range" not in k and "max" not in k and "value" not in k}
    found = M.config_from_hf({**hf, "model_type": "llama", "tie_word_embeddings": True})
    theirs = LlamaConfig(**hf)
    for key in ("rms_norm_eps", "max_position_embeddings", "initializer_range", "num_key_value_heads"):
        assert getattr(found, key) == getattr(theirs, key), key
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("change, named", [
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(hidden_act="gelu"), "hidden_act"), (dict(model_type="qwen2"), "model_type"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"), (dict(head_dim=16), "head_dim"),
    (dict(hidden_size=None), "hidden_size"), (dict(intermediate_size=81), "size mismatch")])
def test_what_differs_is_refused_by_name_in_one_line(change, named, tmp_path):
    save(small(), tmp_path, **change)
    with pytest.raises(ValueError, match=named) as error:
        M.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_refused_and_a_pickle_is_never_read(tmp_path):
    save(small(), tmp_path)
    torch.save(small().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Missing key"):
        M.from_pretrained(str(tmp_path))


# ------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("capability, dtype, why", [
    ((7, 5), torch.float16, "compute capability 7.5 emulates bf16"),
    ((8, 0), torch.bfloat16, "compute capability 8.0")])
def test_a_gpu_has_bf16_from_capability_8_on_and_each_process_its_own(capability, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)  # which would ask for the GPU
    assert M.pick_device() == (torch.device("cuda:0"), dtype, why)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert M.pick_device("cuda") == (torch.device("cuda:3"), dtype, why)
    assert M.pick_device("cuda", "float32") == (torch.device("cuda:3"), torch.float32, "as asked")


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_has_bf16_where_its_processor_does(native, monkeypatch):
    monkeypatch.setattr(M, "native_bf16", lambda: native)
    device, dtype, why = M.pick_device("cpu")
    assert (device.type, dtype) == ("cpu", torch.bfloat16 if native else torch.float32)
    assert why == ("the processor has it" if native else "no native bf16")


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "xla"])
def test_a_device_that_is_not_available_is_named_in_one_line(name):
    with pytest.raises(ValueError, match=f"device = '{name}' is not available here: .") as error:
        M.pick_device(name)
    assert "\n" not in str(error.value)


def test_a_compiler_that_does_not_work_is_a_reason_in_one_line_and_costs_no_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\ncompiler " + "x" * 500)
    monkeypatch.setattr(torch, "compile", broken)
    problem = M.compiler_problem(torch.device("cpu"))
    assert problem.startswith("no compiler x") and len(problem) <= 90
    assert not M.worth_compiling(torch.device("cpu"), 5000)
    monkeypatch.setattr(M, "compiler_problem", lambda device: None)
    cpu = torch.device("cpu")
    assert [M.worth_compiling(cpu, n) for n in (10, 5000)] == [False, True]
