"""model.py: the published sizes, the numbers of transformers, and a cache that changes nothing."""
import json
import runpy
import shutil
from dataclasses import asdict
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper

import model as M
import prepare
import train
from model import LinearCrossEntropy, SmolLM2, SmolLM2Config, generate, sample_token
from tools.bench import flops_per_token

SMALL = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
             initializer_range=0.15)
FULL = asdict(SmolLM2Config())


def small(**sizes):
    torch.manual_seed(0)
    return SmolLM2(SmolLM2Config(**{**SMALL, **sizes}))


def some_ids(B, T, vocab_size=211, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def transformers_twin(ours):
    sizes = asdict(ours.config)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    theirs = LlamaForCausalLM(LlamaConfig(
        **sizes, rope_parameters=rope, tie_word_embeddings=True, attn_implementation="eager"))
    theirs.load_state_dict(ours.state_dict(), assign=ours.lm_head.weight.is_meta)
    return theirs


def assert_same_gradients(model, expected, tolerance=1e-4):
    for name, p in model.named_parameters():
        wanted = expected.get_parameter(name).grad  # (of one token's attention exactly 0)
        assert (p.grad - wanted).norm() <= tolerance * wanted.norm() + 1e-5, name


def plain_loss(model, x, y):
    """The loss of whole logits in fp32, of our model or transformers'."""
    return F.cross_entropy(model(x)[0].float().flatten(0, 1), y.flatten())


def test_it_has_134_515_008_parameters_with_the_names_and_shapes_of_transformers(capsys):
    with torch.device("meta"):
        ours = SmolLM2(SmolLM2Config())
        found, wanted = ours.state_dict(), transformers_twin(ours).state_dict()
        runpy.run_path(M.__file__, run_name="__main__")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert flops_per_token(ours, 256) == 6 * 134_515_008 + 6 * 30 * 9 * 64 * 256  # the scores
    assert capsys.readouterr().out.endswith(")\n134,515,008 parameters\n")


@pytest.mark.slow
def test_the_first_weights_and_the_first_loss(data_dir):
    ours = small(**FULL)
    for name, p in ours.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(1 / 24, rel=0.01) and abs(p.mean()) < 0.001, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name
    ids = torch.tensor(prepare.Data(data_dir).train[:4 * 257].tolist()).view(4, 257)
    with torch.no_grad():
        _, loss = ours(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(11.3, abs=0.12)


@pytest.mark.parametrize("shape, sizes", [
    ((2, 130), {}), ((1, 1), {}), ((3, 7), dict(num_key_value_heads=6)),
    ((2, 600), dict(num_key_value_heads=1)), ((2, 1100), dict(rope_theta=5e2, rms_norm_eps=1e-2))])
def test_logits_equal_transformers_at_other_sizes(shape, sizes):
    """And gradients. On the CPU in fp32 the loss takes 1,024 rows at a time: up to three here."""
    ours = small(**sizes)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)  # a weight of one would show neither its place nor its use
    theirs, x, y = transformers_twin(ours), some_ids(*shape), some_ids(*shape, seed=1)
    with torch.no_grad():
        assert (ours(x)[0] - theirs(x).logits).abs().max().item() < 1e-4
    ours(x, y)[1].backward()
    plain_loss(theirs, x, y).backward()
    assert_same_gradients(ours, theirs)


def test_an_adapter_around_one_of_the_layers_that_share_a_product_is_not_passed_over():
    class Negative(M.Linear):
        def forward(self, x):
            return -super().forward(x)
    adapted, negated, x = small(), small(), some_ids(2, 9)
    attention, adapter = adapted.model.layers[0].self_attn, Negative(48, 48)
    with torch.no_grad():
        negated.model.layers[0].self_attn.q_proj.weight.neg_()
        adapter.weight, attention.q_proj = attention.q_proj.weight, adapter
        assert torch.allclose(adapted(x)[0], negated(x)[0], atol=1e-5)


@pytest.mark.slow
def test_logits_gradients_and_ten_adamw_steps_equal_transformers_at_full_size():
    ours = small(**FULL)
    theirs, ids = transformers_twin(ours), some_ids(1, 513, 49152)
    with torch.no_grad():
        assert (ours(ids)[0] - theirs(ids).logits).abs().max().item() < 1e-4
    groups = [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in theirs.parameters()]
    config, losses = train.TrainConfig(learning_rate=3e-4), []
    ours_adamw = train.make_optimizers(ours, config, torch.float32)["optimizer"]
    theirs_adamw = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    for step in range(10):
        ids = some_ids(2, 49, 2000, seed=step % 2)  # two batches in turns, so that the loss falls
        x, y = ids[:, :-1], ids[:, 1:]
        loss, expected = ours(x, y)[1], plain_loss(theirs, x, y)
        losses.append([loss.item(), expected.item()])
        loss.backward()
        expected.backward()
        if step == 0:
            assert_same_gradients(ours, theirs)
        for m, optimizer in ((ours, ours_adamw), (theirs, theirs_adamw)):
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert all(abs(a - b) < 1e-3 for a, b in losses), losses
    assert losses[-1][0] < losses[0][0] - 0.5, losses  # or nothing was compared


@pytest.mark.parametrize("N, ignored", [(1, []), (1025, range(0, 1025, 7)), (2300, range(1040))])
def test_the_fused_loss_equals_cross_entropy_in_value_and_gradients(N, ignored):
    """Also where a whole chunk of 1,024 rows is ignored."""
    generator = torch.Generator().manual_seed(N)
    x, weight = (torch.randn(n, 24, generator=generator) for n in (N, 301))
    targets = torch.randint(301, (N,), generator=generator)
    targets[list(ignored)] = -100
    inputs = x.requires_grad_(), weight.requires_grad_()
    losses = [LinearCrossEntropy.apply(x, weight, targets, M.cross_entropy_and_gradient),
              F.cross_entropy(x @ weight.t(), targets, ignore_index=-100)]
    found, wanted = ((loss, *torch.autograd.grad(3 * loss, inputs)) for loss in losses)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_of_bf16_logits_is_reduced_in_fp32_and_as_good_as_cross_entropy():
    norm, x = M.RMSNorm(576, 1e-5), 9 * torch.randn(40, 576).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())  # so is a norm
    logits = 5 * torch.randn(40, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.cross_entropy(logits.float(), torch.arange(40), reduction="none")
    found = M.cross_entropy_and_gradient(logits, torch.arange(40))
    assert torch.allclose(found, expected, atol=1e-5)
    ours, ids, losses, grads = small(), some_ids(2, 1301), [], []  # three chunks
    for loss_of, dtype in [(lambda m, x, y: m(x, y)[1], torch.bfloat16),
                           (plain_loss, torch.bfloat16), (plain_loss, torch.float32)]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            assert ours.embed(ids).dtype == dtype
            losses.append(loss_of(ours, ids[:, :-1], ids[:, 1:]))
        found = torch.autograd.grad(losses[-1], list(ours.parameters()))
        grads.append(torch.cat([g.flatten() for g in found]))
    assert losses[0].item() == pytest.approx(losses[2].item(), abs=0.02)
    fused, plain = ((grads[i] - grads[2]).norm() / grads[2].norm() for i in (0, 1))
    assert fused < 1.2 * plain < 0.1


@pytest.mark.parametrize("T", [1, 256, 257, 1023, 1100])
def test_the_attention_of_the_compiled_cpu_path_is_attention(T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = qkv = [torch.randn(2, heads, T, 8, generator=generator, requires_grad=True)
                     for heads in (6, 2, 2)]
    up = torch.randn(2, 6, T, 8, generator=generator)
    found = M.cpu_attention(q, k, v)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y, qkv, up) for y in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_mps, dtype, shared", [(False, torch.float32, False),
    (False, torch.float16, False), (False, torch.bfloat16, True), (True, torch.bfloat16, False)])
def test_keys_are_repeated_where_no_kernel_shares_them(is_mps, dtype, shared, monkeypatch):
    """The tensors are the CPU's, and may say that they are a Mac's."""
    elsewhere = type("Elsewhere", (torch.Tensor,), {"is_mps": is_mps})
    qkv = [torch.randn(2, heads, 9, 8).to(dtype) for heads in (6, 2, 2)]
    expected, fused = M.attention(*qkv), Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    found = M.attention(*(t.as_subclass(elsewhere) for t in qkv))
    assert torch.allclose(found, expected, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert fused.call_args.kwargs["enable_gqa"] == shared
    assert fused.call_args.args[1].size(1) == (2 if shared else 6)


@pytest.fixture(params=["cpu", "cuda"])
def compiling(request):
    """A device on which the compiler works."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if problem := M.compiler_problem(torch.device(request.param)):
        assert not shutil.which("g++"), problem
        pytest.skip(f"no compiler here: {problem}")
    yield request.param
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("sizes, T, dtype, tolerance", [({}, 600, torch.float32, 1e-4),
    (dict(FULL, vocab_size=211, num_hidden_layers=1), 256, torch.bfloat16, 0.05)])
def test_compiled_equals_eager(compiling, sizes, T, dtype, tolerance):
    """At a length of three blocks of attention and of the loss, the last ones cut short."""
    eager, compiled = [small(**sizes).to(compiling) for _ in range(2)]
    compiled.compile_for_training(2 * T)
    assert compiling != "cpu" or compiled.model.layers[0]._compiled_call_impl
    assert list(compiled.state_dict()) == list(eager.state_dict())  # no _orig_mod.
    for seed in range(3):  # CUDA graphs are recorded in the second pass and used in the third
        ids, losses = some_ids(2, T + 1, seed=seed).to(compiling), []
        for m in (eager, compiled):
            m.zero_grad(set_to_none=True)
            with torch.autocast(compiling, dtype, enabled=dtype == torch.bfloat16):
                losses.append(m(ids[:, :-1], ids[:, 1:])[1])
            losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance / 50)
    assert_same_gradients(compiled, eager, tolerance)


def lively(m):
    """Fresh weights with tied embeddings mostly repeat the last token, whatever a cache does."""
    with torch.no_grad():
        for p in m.model.layers.parameters():
            if p.dim() == 2:
                p.normal_(std=1.5 * p.size(1)**-0.5)
        m.model.embed_tokens.weight.mul_(0.1)
    return m


def assert_greedy(m, prompt, tokens):
    """Each token is the likeliest after all before it, by a pass over the whole text, uncached."""
    text = torch.cat((prompt, torch.stack(list(tokens), dim=1)), dim=1)
    with torch.no_grad():
        likeliest = m(text[:, :-1])[0].argmax(-1)
    T = prompt.size(1)
    assert torch.equal(text[:, T:], likeliest[:, T - 1:])
    assert len(text[0, T:].unique()) > min(30, len(tokens) // 4)  # repetitions prove nothing


@pytest.mark.parametrize("sizes, B, T, n, dtype, tolerance", [
    ({}, 2, 1, 400, torch.float32, 1e-3), ({}, 1, 63, 150, torch.float32, 1e-3),
    ({}, 1, 64, 150, torch.float32, 1e-3), ({}, 2, 20, 150, torch.bfloat16, 0.3),
    (dict(num_key_value_heads=1), 3, 65, 150, torch.float32, 1e-3),
    (dict(num_key_value_heads=6), 1, 300, 200, torch.float32, 1e-3),
    pytest.param(FULL, 1, 20, 40, torch.float32, 1e-3, marks=pytest.mark.slow)])
def test_the_cache_changes_no_token_and_hardly_a_logit(sizes, B, T, n, dtype, tolerance):
    """Of hundreds, and at full size. The cache lies in blocks of 64 positions."""
    m, prompt = lively(small(**sizes)).to(dtype), some_ids(B, T)
    with patch.object(M, "sample_token", wraps=M.sample_token) as sampling:
        tokens = list(generate(m, prompt, n, temperature=0))
    logits = torch.stack([call.args[0].float() for call in sampling.call_args_list], dim=1)
    if dtype == torch.float32:
        assert_greedy(m, prompt, tokens)
    with torch.no_grad():
        expected = m.float()(torch.cat((prompt, torch.stack(tokens, 1)), 1))[0][:, T - 1:-1]
    assert (logits - expected).abs().max() < tolerance * expected.std()


def test_generation_goes_through_a_changed_layer_too():
    class Loud(M.DecoderLayer):
        def forward(self, *args):
            return 1.5 * super().forward(*args)
    with patch.object(M, "DecoderLayer", Loud):
        m = lively(small())
    assert_greedy(m, some_ids(2, 20), list(generate(m, some_ids(2, 20), 150, temperature=0)))


@pytest.mark.slow
def test_compiled_generation_changes_no_token(compiling):
    """One text, two, another model: in turns, as each trusts what was compiled for it."""
    other = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = [lively(small(**changes)).to(compiling) for changes in ({}, {}, other)]
    prompts = [some_ids(B, 50).to(compiling) for B in (1, 2, 1)]
    streams = [generate(m, p, 250, compile=True, temperature=0) for m, p in zip(models, prompts)]
    torch._dynamo.utils.counters.clear()
    texts = [*zip(*zip(*streams, strict=True))]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]  # it was compiled, indeed
    for m, prompt, tokens in zip(models, prompts, texts):
        assert_greedy(m, prompt, tokens)


def test_more_positions_than_the_model_has_are_a_clear_error():
    m, prompt = small(max_position_embeddings=32), some_ids(1, 20)
    with pytest.raises(ValueError, match="33 .* 32"):
        m(some_ids(1, 33))
    with pytest.raises(ValueError, match="33 .* 32"):
        next(generate(m, prompt, 13))
    assert len(list(generate(m, prompt, 12))) == 12 and list(generate(m, prompt, 0)) == []


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.5), dict(top_k=6), dict(top_p=0.8),
    dict(top_k=7, top_p=0.7, temperature=1.5)])
def test_tokens_come_with_the_probabilities_of_the_softmax(sampling):
    """Chi-square against the probabilities that transformers samples by."""
    logits, n = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(1)), 20_000
    scores = logits.double()[None] / sampling.get("temperature", 1.0)
    scores = TopKLogitsWarper(sampling.get("top_k", 12))(None, scores)
    scores = TopPLogitsWarper(sampling.get("top_p", 1.0))(None, scores)
    expected = n * scores[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(n, -1).clone(), generator=generator, **sampling)
    counts, kept = torch.bincount(drawn, minlength=12), expected > 0
    assert not counts[~kept].any()
    chi2 = ((counts - expected)**2 / expected)[kept].sum()
    assert chi2 < 3 * kept.sum() + 10, (chi2, counts)  # beyond the 99.9th percentile at these sizes


def test_weights_come_from_transformers_to_the_bit_and_never_from_a_pickle(tmp_path):
    ours = small(rms_norm_eps=3e-4, rope_theta=777.0)
    transformers_twin(ours).save_pretrained(tmp_path)
    back = M.from_pretrained(str(tmp_path))
    assert back.config == ours.config
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in back.state_dict().items())
    transformers_twin(ours).bfloat16().save_pretrained(tmp_path)
    half = M.from_pretrained(str(tmp_path))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Missing key"):
        M.from_pretrained(str(tmp_path))


def test_config_json_is_read_as_transformers_reads_it():
    """The older way to write the rotary base, as an int, too; defaults for what is left out."""
    llama = {**SMALL, "model_type": "llama", "tie_word_embeddings": True}
    assert repr(M.config_from_hf({**llama, "rope_theta": 777}).rope_theta) == "777.0"
    left_out = ("max_position_embeddings", "initializer_range", "num_key_value_heads")
    hf = {k: v for k, v in llama.items() if k not in left_out}
    found, theirs = M.config_from_hf(hf), LlamaConfig(**hf)
    for key in (*left_out, "rms_norm_eps"):
        assert getattr(found, key) == getattr(theirs, key), key
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("change, named", [
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(model_type="qwen2"), "model_type"), (dict(head_dim=16), "head_dim"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "type = 'linear'"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(hidden_size=None), "hidden_size"), (dict(intermediate_size=81), "size mismatch")])
def test_what_differs_is_refused_by_name_in_one_line(change, named, tmp_path):
    transformers_twin(small()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named) as error:
        M.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_bf16_is_picked_where_the_machine_has_it_and_each_process_has_its_own_gpu(monkeypatch):
    bf16, intel = {"avx512_bf16": True}, {"avx512_bf16": True, "cpu_name": "Intel Xeon"}
    for has, dtype in ((intel, torch.float32), (intel | {"amx_bf16": True}, torch.bfloat16),
                       ({"avx512_bf16": False}, torch.float32), (bf16, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert M.pick_device("cpu")[:2] == (torch.device("cpu"), dtype)
        assert M.pick_device("cpu", decoding=True)[1] == torch.bfloat16  # but a prompt is read as
        with patch.object(M, "attention", wraps=M.attention) as attention:
            next(generate(small().bfloat16(), some_ids(1, 9), 1))
        assert attention.call_args.args[0].dtype == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # as on a Mac
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", None)  # a GPU that breaks is not asked
    assert M.pick_device("cpu")[1] == torch.float32 and train.rng_state()["cuda"] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "zeros", Mock())  # which would ask for the GPU
    for capability, dtype in ((7, 5), torch.float16), ((8, 0), torch.bfloat16):
        assert M.pick_device()[:2] == (torch.device("cuda:0"), dtype)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert M.pick_device("cuda", "float32")[:2] == (torch.device("cuda:3"), torch.float32)


def test_memory_that_ran_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError, check=M.is_out_of_memory):
        torch.empty(10**15)
    assert not M.is_out_of_memory(RuntimeError("System call (e.g. socket, malloc) failed"))


def test_a_compiler_that_does_not_work_is_a_reason_in_one_line_and_no_error(monkeypatch):
    cpu, error = torch.device("cpu"), RuntimeError("Command:\nOutput:\nno\ncompiler " + "x" * 500)
    monkeypatch.setattr(torch, "compile", Mock(side_effect=error))
    assert M.compiler_problem.__wrapped__(cpu) == f"RuntimeError: no compiler {'x' * 68}"
    monkeypatch.setattr(torch, "compile", Mock(side_effect=[lambda x, *_: x + 1, M.apply_rotary]))
    assert M.compiler_problem.__wrapped__(cpu) is None  # (of what is right: vectors of 256 bits)
    assert torch.compile.call_count == 2
    M.compiler_problem.cache_clear()  # the next one who asks sets the compiler up again
    for problem, worth in ("none", [False, False]), (None, [False, True]):
        monkeypatch.setattr(M, "compiler_problem", lambda device: problem)
        assert [M.worth_compiling(cpu, n) for n in (10, 5000)] == worth
