"""Steps on the device: equal to the oracle in all they do, captured once, and looked at by the host every few steps only."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from golden_data import GOLDEN, golden_arrays, golden_cases, mixed_batch

MASK, IMAGE, END, PAD = 509, 500, 505, 506
HEADER = [504, 507, 508]
SETTINGS = {"max_new_tokens": 45, "block_size": 8, "denoising_steps": 4, "mask_token_id": MASK, "eos_token_id": END}
STRATEGIES = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "dynamic": {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.6},
    "entropy": {"remasking_strategy": "entropy_bound"},
    "revision": {"edit_threshold": 0.3, "max_post_edit_steps": 3},
    "sampling": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """A pool of the test's own."""
    from nemo_bard.generation import session

    monkeypatch.setattr(session, "POOL", session.Pool())
    return session.POOL


@pytest.fixture
def model():
    """A model of the test's own, in float32."""
    from nemo_bard import BardVLForConditionalGeneration

    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / "models/tiny_untied").eval()


@pytest.fixture(scope="module")
def batch():
    return mixed_batch(image=IMAGE, header=HEADER, end=END, padding=PAD)


def decode(model, batch, **settings):
    generator = torch.Generator().manual_seed(3) if "temperature" in settings else None
    return model.generate(
        batch,
        generator=generator,
        return_dict_in_generate=True,
        **{**SETTINGS, "pad_token_id": PAD, **settings},
    )


def assert_equal(output, expected):
    assert output.lengths.tolist() == expected.lengths.tolist()
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.block_step_counts.tolist() == expected.block_step_counts.tolist()


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_oracle(strategy, context_attention, model, batch):
    """Ragged rows with images and earlier turns, which end in different blocks, at both kinds of context."""
    model.config.context_attention = context_attention
    model.config.assistant_header_ids = HEADER
    free = decode(model, batch, decode_path="plain", **STRATEGIES[strategy])
    ends = [int(free.sequences[0, 19]), int(free.sequences[2, 10])]
    settings = {**STRATEGIES[strategy], "eos_token_id": ends}
    expected = decode(model, batch, decode_path="plain", **settings)
    assert len(set(expected.lengths.tolist())) > 1
    assert_equal(decode(model, batch, decode_path="graph", **settings), expected)
    assert_equal(decode(model, batch, **settings), expected)


def kernel_of_sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """What ``torch.nn.attention.varlen.varlen_attn`` says it computes, a sequence after the other."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == options["seqused_k"].dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k) == len(options["seqused_k"]) + 1
    assert cu_seq_q[-1] == len(query)
    out = torch.full_like(query, torch.nan)
    for begin, end, start, used in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k, options["seqused_k"], strict=False):
        assert 0 < end - begin <= max_q
        assert 0 < used <= max_k
        keys, values = (x[start : start + used].transpose(0, 1) for x in (key, value))
        mask = torch.ones(int(end - begin), int(used), dtype=torch.bool)
        if options["window_size"] == (-1, 0):
            mask = mask.tril(int(used - (end - begin)))
        part = torch.nn.functional.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1), keys, values, attn_mask=mask, scale=options["scale"], enable_gqa=True
        )
        out[begin:end] = part.transpose(0, 1).nan_to_num()  # no keys: the kernel gives 0
    return out


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_sequences_say_the_same_as_masks(strategy, context_attention, model, batch, monkeypatch):
    """Prompt and steps as the kernel on CUDA takes them, with the kernel's definition in its place."""
    from torch.nn.attention import varlen

    from nemo_bard.generation import runner

    model.config.context_attention = context_attention
    model.config.assistant_header_ids = HEADER
    expected = decode(model, batch, decode_path="plain", **STRATEGIES[strategy])
    monkeypatch.setattr(varlen, "varlen_attn", kernel_of_sequences)
    monkeypatch.setattr(runner, "has_kernel", lambda *_: True)
    assert_equal(decode(model, batch, decode_path="graph", **STRATEGIES[strategy]), expected)


def test_compiled_kernels_say_the_same(model, batch):
    settings = {"decode_path": "graph", **STRATEGIES["sampling"], "max_new_tokens": 16}
    assert_equal(decode(model, batch, compile_step=True, **settings), decode(model, batch, **settings))


def test_five_models_in_a_process_run_compiled(monkeypatch):
    """Each of another size and at two numbers of rows: compiled code is each model's own, so that no limit is shared."""
    import torch._dynamo

    from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
    from nemo_bard.generation import kernels

    monkeypatch.setattr(kernels, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for number in range(5):
        torch.manual_seed(number)
        config = BardVLConfig.from_pretrained(GOLDEN / "models/tiny_untied")
        config.text_config.intermediate_size = 64 + 32 * number
        model = BardVLForConditionalGeneration(config).eval()
        for rows in (1, 2):
            prompt = {"input_ids": torch.arange(5).repeat(rows, 1)}
            settings = {"decode_path": "graph", "max_new_tokens": 16}
            compiled = decode(model, prompt, compile_step=True, **settings)
            assert_equal(compiled, decode(model, prompt, **settings))
    stats = torch._dynamo.utils.counters
    # four kernels, the norm inside two more; five models, two numbers of rows, one shape of steps
    assert stats["stats"]["unique_graphs"] == 4 * 5 * 2
    assert not stats["graph_break"]
    assert not stats["unimplemented"]


def test_hooks_on_modules_are_called(model, batch):
    """Then the modules run, one by one; the ids stay."""
    expected, seen = decode(model, batch, decode_path="graph"), []
    handle = model.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    try:
        output = decode(model, batch, decode_path="graph")
    finally:
        handle.remove()
    assert_equal(output, expected)
    assert len(seen) == output.forwards


def test_joined_weights_take_no_memory_and_are_the_parameters(model, batch, tmp_path):
    """The parameters stay, trained and saved as before; a change to them is a change to what is decoded with."""
    from nemo_bard import BardVLForConditionalGeneration

    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    decode(model, batch, decode_path="graph")
    after = dict(model.named_parameters())
    assert all(
        after[name] is parameter and torch.equal(parameter, value) for name, (parameter, value) in before.items()
    )
    attention, mlp = model.model.language_model.layers[0].self_attn, model.model.language_model.layers[0].mlp
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        storages = {linear.weight.untyped_storage().data_ptr() for linear in group}
        assert len(storages) == 1
        assert group[0].weight.untyped_storage().nbytes() == sum(linear.weight.nbytes for linear in group)
    model.save_pretrained(tmp_path / "saved")
    again = BardVLForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert all(torch.equal(value, before[name][1]) for name, value in again.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = decode(model, batch, decode_path="graph")
    assert_equal(changed, decode(copy.deepcopy(model), batch, decode_path="plain"))


def test_another_weight_in_a_parameters_place_is_noticed(model, batch):
    other = {name: value.flip(0) for name, value in model.state_dict().items()}
    decode(model, batch, decode_path="graph")
    for name, parameter in model.named_parameters():
        parameter.data = other[name].clone()
    assert_equal(decode(model, batch, decode_path="graph"), decode(model, batch, decode_path="plain"))


def test_a_runner_serves_calls_of_other_lengths(model, batch, pool):
    """One cache for all of them while it is large enough; rows, settings and longer prompts get others."""
    decode(model, batch, decode_path="graph")
    (kept,) = pool.idle[model]
    addresses = [tensor.data_ptr() for tensor in kept.thing.state.tensors()]
    addresses += [layer.keys.data_ptr() for layer in kept.thing.cache.layers]
    for length in (5, 100, 45):
        output = decode(model, batch, decode_path="graph", max_new_tokens=length)
        assert_equal(output, decode(model, batch, decode_path="plain", max_new_tokens=length))
    assert [one.thing for one in pool.idle[model]] == [kept.thing]
    now = [tensor.data_ptr() for tensor in kept.thing.state.tensors()]
    assert now + [layer.keys.data_ptr() for layer in kept.thing.cache.layers] == addresses
    decode(model, batch, decode_path="graph", max_new_tokens=600)
    assert [one.thing.capacity for one in pool.idle[model]] == [1024]


class Recorder:
    """Stands in for ``torch.cuda.CUDAGraph`` and its context: remembers that it was captured, and replays by calling."""

    def __init__(self, run):
        self.run, self.replays = run, 0

    def replay(self):
        self.replays += 1
        self.run()


@pytest.fixture
def recorders(monkeypatch):
    """Lets a CPU take the path of captured graphs; gives the list of those."""
    from nemo_bard.generation import capture, runner

    made = []

    def record(self):
        made.append(Recorder(self.run))
        return made[-1]

    monkeypatch.setattr(capture.Captured, "_capture", record)

    class Always(capture.Captured):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "enabled": True})

    monkeypatch.setattr(runner, "Captured", Always)
    return made


def test_one_graph_for_each_shape(recorders, model, batch):
    """Known steps use the narrow one between blocks; steps that depend on the model use the wide one alone."""
    static = {"decode_path": "graph", **STRATEGIES["static"]}
    for _ in range(3):
        output = decode(model, batch, **static)
    assert len(recorders) == 2
    assert sum(one.replays for one in recorders) == 3 * (output.forwards - 1)
    recorders.clear()
    decode(model, batch, decode_path="graph", **STRATEGIES["dynamic"])
    assert len(recorders) == 1


@pytest.mark.parametrize("what", ["no CUDA", "no compiler"])
def test_a_capture_that_fails_gives_one_warning_and_the_same_ids(what, model, batch, monkeypatch, caplog):
    """There is no CUDA here, so it fails for real; a compiler that does not work is no reason to end either."""
    from nemo_bard.generation import capture, runner
    from nemo_bard.generation.kernels import Kernels

    class Failing(capture.Captured):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "enabled": True})

    def broken(*_):
        raise RuntimeError("no working C compiler")

    expected = decode(model, batch, decode_path="plain")
    monkeypatch.setattr(runner, "Captured", Failing)
    if what == "no compiler":
        kernels = Kernels(norm=broken, add_norm=broken, rotate=broken, gate=broken)
        monkeypatch.setattr(Kernels, "compiled", classmethod(lambda cls: kernels))
    settings = {"decode_path": "graph", "compile_step": what == "no compiler"}
    with caplog.at_level(logging.WARNING):
        output, again = (decode(model, batch, **settings) for _ in range(2))
    assert output.sequences.tolist() == again.sequences.tolist() == expected.sequences.tolist()
    assert len([record for record in caplog.records if "without a CUDA graph" in record.message]) == 1


@pytest.mark.parametrize("case", golden_cases("generate")[:6], ids=lambda case: case["file"].removesuffix(".npz"))
def test_streams_hand_on_the_blocks_as_they_are(case, golden_model):
    arrays = golden_arrays("generate", case["file"])
    model, blocks = golden_model(case["model"]), []

    class Streamer:
        def put(self, ids):
            blocks.append(ids.tolist())

        def end(self):
            blocks.append(None)

    names = ("input_ids", "pixel_values", "image_grid_thw")
    prompt = {name: arrays[name] for name in names if name in arrays}
    ids = model.generate(prompt, streamer=Streamer(), decode_path="graph", **case["settings"])
    size = case["settings"]["block_size"]
    assert blocks[0] == prompt["input_ids"].tolist()
    assert blocks[-1] is None
    assert blocks[1:-1] == [ids[0, i : i + size].tolist() for i in range(0, ids.shape[1], size)]


class TestLookingAtSteps:
    """Whoever looks at single steps gets the same from the slower loop, which says that it is slower."""

    def test_history(self, model, batch, caplog):
        plain = decode(model, batch, decode_path="plain", output_history=True)
        output = decode(model, batch, decode_path="graph", output_history=True, compile_step=True)
        assert_equal(output, plain)
        assert len(output.history) == len(plain.history)
        for ours, theirs in zip(output.history, plain.history, strict=True):
            assert torch.equal(ours.ids, theirs.ids)
            torch.testing.assert_close(ours.confidence, theirs.confidence, rtol=0, atol=1e-4, equal_nan=True)
        assert any("step by step" in record.message and "output_history" in record.message for record in caplog.records)

    def test_processors_and_criteria(self, model, batch):
        from transformers import LogitsProcessorList, StoppingCriteriaList

        def never(token):
            return lambda ids, logits: logits.index_fill(-1, torch.tensor([token]), float("-inf"))

        free = decode(model, batch, decode_path="plain")
        hooks = {
            "logits_processor": LogitsProcessorList([never(int(free.sequences[0, 0]))]),
            "stopping_criteria": StoppingCriteriaList([lambda ids, _: ids[:, -16:].sum(1) % 3 == 0]),
        }
        assert_equal(
            decode(model, batch, decode_path="graph", **hooks), decode(model, batch, decode_path="plain", **hooks)
        )

    def test_a_strategy_that_reads_on_the_host(self, model, batch, monkeypatch):
        from nemo_bard.generation.strategies import LowConfidenceStatic

        expected = decode(model, batch, decode_path="graph", **STRATEGIES["static"])
        monkeypatch.setattr(LowConfidenceStatic, "on_device", False)
        monkeypatch.setattr(LowConfidenceStatic, "fix", lambda _, state: first_masked(state, int(state.quota)))
        output = decode(model, batch, decode_path="graph", **STRATEGIES["static"])
        assert output.block_step_counts.tolist() == expected.block_step_counts.tolist()


def first_masked(state, quota):
    return state.is_masked & (state.is_masked.cumsum(1) <= quota)


def test_refused():
    from nemo_bard import BardGenerationConfig

    with pytest.raises(ValueError, match="decode_path=graph needs cache_implementation=static or none, got 'dynamic'"):
        BardGenerationConfig(decode_path="graph", cache_implementation="dynamic")
    BardGenerationConfig(decode_path="graph", compile_step=True)


def test_draws_of_a_row_depend_on_its_seed_block_step_and_column_alone():
    from nemo_bard.generation.sampling import uniform_numbers

    seeds, zero = torch.arange(2000) * 7919, torch.zeros(2000, dtype=torch.int64)
    numbers = uniform_numbers(seeds, zero, zero, 32)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert numbers.dtype == torch.float64
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    assert len(numbers.unique()) == numbers.numel()
    assert (numbers[:, :-1] - 0.5).mul(numbers[:, 1:] - 0.5).mean().abs() < 0.002
    assert torch.equal(uniform_numbers(seeds[5:6], zero[:1], zero[:1], 32)[0], numbers[5])
    for block, step in ((1, 0), (0, 1)):
        other = uniform_numbers(seeds, zero + block, zero + step, 32)
        assert (other - 0.5).mul(numbers - 0.5).mean().abs() < 0.002
