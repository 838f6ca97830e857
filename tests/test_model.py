"""model.py: the published sizes, the numbers of transformers' LlamaForCausalLM, and a cache that changes nothing."""
import copy
import json
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from transformers import LlamaConfig, LlamaForCausalLM

import model as M
import train
from model import LinearCrossEntropy, SmolLM2, SmolLM2Config, generate, sample_token

SMALL = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15)


def small(**sizes):
    torch.manual_seed(0)
    return SmolLM2(SmolLM2Config(**{**SMALL, **sizes}))


def transformers_config(config):
    sizes = asdict(config)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    return LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
                       hidden_act="silu", attn_implementation="eager")


def transformers_twin(ours):
    """transformers' model with the same weights."""
    theirs = LlamaForCausalLM(transformers_config(ours.config))
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.fixture(scope="module")
def full_size():
    """(ours, theirs) at full size with the same random weights, fp32."""
    torch.manual_seed(0)
    ours = SmolLM2(SmolLM2Config())
    return ours, transformers_twin(ours)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------ the sizes


def test_it_has_134_515_008_parameters():
    with torch.device("meta"):
        ours = SmolLM2(SmolLM2Config())
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008


def test_state_dict_has_the_keys_and_shapes_of_transformers():
    with torch.device("meta"):
        ours, theirs = SmolLM2(SmolLM2Config()), LlamaForCausalLM(transformers_config(SmolLM2Config()))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_python_model_py_prints_the_table_and_the_flops():
    done = run_script("model.py")
    assert done.code == 0 and "DecoderLayer" in done.out, done.err
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d.]+)%$", done.out, re.M)
    counts = {name: int(n.replace(",", "")) for name, n, _ in rows}
    assert counts.pop("total") == sum(counts.values()) == 134_515_008
    assert counts["embed_tokens"] == 49152 * 576
    assert sum(float(share) for name, _, share in rows if name != "total") == pytest.approx(100, abs=0.1)
    full, half = (6 * 134_515_008 + 12 * 30 * 9 * 64 * 256 / part for part in (1, 2))
    line = next(line for line in done.out.splitlines() if line.split()[:3] == ["4", "x", "256"])
    assert [float(n) for n in re.findall(r"\d+\.\d+", line)] == pytest.approx(
        [full / 1e9, half / 1e9, full * 1024 / 1e12, half * 1024 / 1e12], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("initializer_range, expected", [(1 / 24, 11.3), (0.02, 10.95)])
def test_the_first_loss(initializer_range, expected, data_dir):
    import numpy as np
    torch.manual_seed(1337)
    ours = SmolLM2(SmolLM2Config(initializer_range=initializer_range))
    ids = torch.from_numpy(np.fromfile(data_dir / "train.bin", dtype="<u2")[:4 * 257].astype(np.int64)).view(4, 257)
    with torch.no_grad():
        _, loss = ours(ids[:, :-1], ids[:, 1:], logits_to_keep=None)
    assert loss.item() == pytest.approx(expected, abs=0.12)


def test_the_first_weights_are_normal_and_the_norms_one():
    ours = small(initializer_range=0.07)
    for name, p in ours.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.07, rel=0.1) and abs(p.mean().item()) < 0.01, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


# --------------------------------------------------------------------------------------- the same as transformers


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
    theirs = transformers_twin(ours)
    idx = torch.randint(211, (2, 130))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max().item() < 1e-4


def test_logits_to_keep_are_the_last_ones():
    ours, idx = small(), torch.randint(211, (2, 9))
    all_logits = ours(idx)[0]
    assert torch.allclose(ours(idx, logits_to_keep=3)[0], all_logits[:, -3:], atol=1e-6)
    logits, loss = ours(idx, idx, logits_to_keep=None)
    assert logits is None
    assert loss.item() == pytest.approx(F.cross_entropy(all_logits.flatten(0, 1), idx.flatten()).item(), abs=1e-5)


@pytest.mark.slow
def test_gradients_equal_transformers_at_full_size(full_size):
    ours, theirs = full_size
    ids = torch.randint(49152, (1, 513), generator=torch.Generator().manual_seed(2))
    x, y = ids[:, :-1], ids[:, 1:]
    ours(x, y, logits_to_keep=None)[1].backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    expected = dict(theirs.named_parameters())
    worst = max((relative(p.grad, expected[name].grad), name) for name, p in ours.named_parameters())
    for m in full_size:
        m.zero_grad(set_to_none=True)
    assert len(expected) == len(list(ours.parameters())) and worst[0] < 1e-4, worst


@pytest.mark.slow
def test_ten_adamw_steps_stay_within_1e_3_of_transformers_at_full_size(full_size):
    ours, theirs = (copy.deepcopy(m) for m in full_size)
    config = train.TrainConfig(learning_rate=3e-4)
    params = list(theirs.parameters())
    optimizers = [train.make_optimizers(ours, config)["optimizer"], torch.optim.AdamW(
        [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}], lr=3e-4, betas=(0.9, 0.95))]
    losses = []
    for step in range(10):
        ids = torch.randint(2000, (2, 49), generator=torch.Generator().manual_seed(step % 2))  # so the loss falls
        x, y = ids[:, :-1], ids[:, 1:]
        pair = ours(x, y, logits_to_keep=None)[1], F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        for m, loss, optimizer in zip((ours, theirs), pair, optimizers):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append([loss.item() for loss in pair])
    assert all(abs(a - b) < 1e-3 for a, b in losses), losses
    assert losses[-1][0] < losses[0][0] - 0.5, losses  # or nothing was compared


# --------------------------------------------------------------------------------------- the loss and the compiler


@pytest.mark.parametrize("N", [1, 512, 513, 1300])
def test_the_fused_loss_equals_cross_entropy_in_value_and_gradients(N):
    """On the CPU in fp32 a chunk has 512 rows: up to three of them here."""
    generator = torch.Generator().manual_seed(N)
    x, weight = torch.randn(N, 24, generator=generator), torch.randn(301, 24, generator=generator)
    targets = torch.randint(301, (N,), generator=generator)
    if N > 1:
        targets[::7] = -100
        targets[:min(N - 1, 520)] = -100 if N == 1300 else targets[:min(N - 1, 520)]  # and a chunk without any
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


def test_the_fused_loss_under_bf16_autocast_is_as_good_as_cross_entropy():
    ours, ids = small(max_position_embeddings=2560), torch.randint(211, (1, 2501))  # chunks of 1,024: three
    grads = {}
    for way, dtype, keep in [("fused", torch.bfloat16, None), ("plain", torch.bfloat16, 0), ("fp32", torch.float32, 0)]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = ours(ids[:, :-1], ids[:, 1:], logits_to_keep=keep)[1]
        loss.backward()
        grads[way] = loss.item(), torch.cat([p.grad.flatten() for p in ours.parameters()])
        ours.zero_grad(set_to_none=True)
    assert grads["fused"][0] == pytest.approx(grads["fp32"][0], abs=0.02)
    assert relative(grads["fused"][1], grads["fp32"][1]) < 1.2 * relative(grads["plain"][1], grads["fp32"][1]) < 0.1


@pytest.mark.parametrize("T", [1, 5, 256, 257, 300, 1023, 1100])
def test_the_attention_of_the_compiled_cpu_path_is_attention(T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2))
    up = torch.randn(2, 6, T, 8, generator=generator)
    found = torch.autograd.grad(y := M.cpu_attention(q, k, v), (q, k, v), up)
    wanted = torch.autograd.grad(z := F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True), (q, k, v), up)
    assert torch.allclose(y, z, atol=1e-5)
    assert all(torch.allclose(f, w, atol=1e-4) for f, w in zip(found, wanted))


def need_compiler(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if problem := train.compiler_problem(torch.device(device)):
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
        for seed in range(3):  # CUDA graphs are recorded in the second pass, and used from the third on
            ids = torch.randint(211, (2, T + 1), generator=torch.Generator().manual_seed(seed)).to(device)
            m.zero_grad(set_to_none=True)
            loss = m(ids[:, :-1], ids[:, 1:], logits_to_keep=None)[1]
            loss.backward()
        losses.append(loss)
    torch._dynamo.reset()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    expected = dict(eager.named_parameters())
    worst = max((relative(p.grad, expected[name].grad), name) for name, p in compiled.named_parameters())
    assert worst[0] < 1e-4, worst


# ------------------------------------------------------------------------------------------------------ generation


def lively(m):
    """Fresh weights with tied embeddings mostly repeat the last token, whatever a cache does; these do not."""
    with torch.no_grad():
        for layer in m.model.layers:
            for p in layer.parameters():
                if p.dim() == 2:
                    p.normal_(std=1.5 * p.size(1)**-0.5)
        m.model.embed_tokens.weight.mul_(0.1)
    return m


def greedy_without_cache(m, idx, n):
    with torch.no_grad():
        for _ in range(n):
            idx = torch.cat((idx, m(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def greedy_with_cache(m, idx, n, **kwargs):
    return torch.cat((idx, torch.stack(list(generate(m, idx, n, temperature=0, **kwargs)), dim=1)), dim=1)


@pytest.mark.parametrize("kv_heads, B, prompt_length, n", [(2, 2, 1, 400), (6, 1, 17, 320), (2, 1, 63, 40),
                                                          (2, 1, 64, 40), (1, 3, 65, 80), (2, 1, 300, 40)])
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


@pytest.mark.parametrize("B, T, dtype, tolerance", [(1, 20, torch.float32, 1e-3), (3, 70, torch.float32, 1e-3),
                                                    (2, 20, torch.bfloat16, 0.3)])
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
    assert ((torch.stack(logits, dim=1) - expected).abs().max() / expected.std()).item() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("device, what", [("cpu", "layer"), ("cpu", "step"), ("cuda", "layer")])
def test_compiled_generation_changes_no_token(device, what):
    """Of one row, of two, of another model: in turns, since after its first step each trusts what was compiled for it."""
    need_compiler(device)
    sizes = {}, {}, {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = [lively(small(**changes)).to(device) for changes in sizes]
    prompts = [torch.randint(211, (B, 50), device=device) for B in (1, 2, 1)]
    streams = [generate(m, prompt, 250, compile=what, temperature=0) for m, prompt in zip(models, prompts)]
    found = list(zip(*streams, strict=True))
    torch._dynamo.reset()
    for m, prompt, tokens in zip(models, prompts, zip(*found)):
        assert torch.equal(torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1), greedy_without_cache(m, prompt, 250))


def test_more_positions_than_the_model_has_are_a_clear_error():
    m = small(max_position_embeddings=32)
    with pytest.raises(ValueError, match="33 positions, but the model has 32"):
        m(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="20 tokens and 13 new ones do not fit into the model's 32 positions"):
        next(generate(m, torch.zeros(1, 20, dtype=torch.long), 13))
    assert len(list(generate(m, torch.zeros(1, 20, dtype=torch.long), 12))) == 12


# -------------------------------------------------------------------------------------------------------- sampling


def draw(logits, n=4000, seen=None, **sampling):
    """n draws from logits (V,)."""
    seen = torch.zeros(n, 0, dtype=torch.long) if seen is None else torch.tensor([seen] * n)
    return sample_token(logits.expand(n, -1).clone(), seen, generator=torch.Generator().manual_seed(0), **sampling)


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, torch.zeros(5, 0, dtype=torch.long), temperature=0), logits.argmax(-1))


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.5), dict(temperature=2.0), dict(top_k=6), dict(top_p=0.8),
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


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for sampling in (dict(top_k=1), dict(top_p=1e-6)):
        assert set(draw(logits, 200, **sampling).tolist()) == {logits.argmax().item()}


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    counts = torch.bincount(draw(logits, 20_000, seen=[0, 2, 0], repetition_penalty=1.5), minlength=4) / 20_000
    expected = torch.softmax(torch.tensor([2.0 / 1.5, 1.5, -1.5, -1.2]), 0)  # a token seen twice counts once
    assert torch.allclose(counts, expected, atol=0.015)
    assert draw(logits, 1, seen=[0], repetition_penalty=1.5, temperature=0).item() == 1


def test_a_very_low_temperature_does_not_overflow():
    assert set(draw(torch.tensor([1.0, 3.0, 2.0]), 50, temperature=1e-30).tolist()) == {1}


# --------------------------------------------------------------------------- weights in Hugging Face's format


def test_weights_go_to_transformers_and_back(tmp_path):
    ours = small()
    M.save_pretrained(ours, tmp_path / "hf")
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    idx = torch.randint(211, (2, 40))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max().item() < 1e-4
    theirs.save_pretrained(tmp_path / "back")
    back = M.from_pretrained(str(tmp_path / "back"))
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.mark.parametrize("rope", [{"rope_theta": 777.0},
                                  {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}])
def test_both_ways_to_write_the_rotary_base_are_read(rope):
    assert M.config_from_hf({**SMALL, "model_type": "llama", "tie_word_embeddings": True, **rope}).rope_theta == 777.0


@pytest.mark.parametrize("change, named", [
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(hidden_act="gelu"), "hidden_act"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"), (dict(model_type="qwen2"), "model_type"),
    (dict(head_dim=16), "head_dim"), (dict(hidden_size=None), "hidden_size"),
])
def test_what_another_architecture_has_is_refused_by_name(change, named, tmp_path):
    M.save_pretrained(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named):
        M.from_pretrained(str(tmp_path))


def test_weights_that_do_not_fit_or_are_missing_are_refused(tmp_path):
    M.save_pretrained(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(ValueError, match="do not fit its config.json"):
        M.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(small().state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is never read
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError):
        M.from_pretrained(str(tmp_path))
