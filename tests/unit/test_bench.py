"""The benchmark's arithmetic, layout and argument errors; no engine, no timings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_kvcompress.tools import arms, bench_model, engine_run
from vllm_kvcompress.tools.bench import shape_command as bench
from vllm_kvcompress.tools.bench.comparison import HIGHER_IS_BETTER, comparison, lost
from vllm_kvcompress.tools.bench.report import shape_table, verdict
from vllm_kvcompress.tools.bench.shapes import SHAPES, limit
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.trace import Step, measure, medians, ratio, widest_decode


def step(end: float, tokens: dict[str, int], **changes) -> Step:
    values = {
        "seconds": 1.0,
        "end": end,
        "prompt": False,
        "tokens": tokens,
        "running": len(tokens),
        "held_blocks": 10,
    }
    return Step(**{**values, **changes})


TRACE = [
    step(4.0, {"a": 1}, prompt=True, seconds=4.0, running=2, held_blocks=99),
    step(7.0, {"a": 1, "b": 1}, prompt=True, seconds=3.0, running=3, held_blocks=98),
    step(7.5, {"a": 1, "b": 1}, seconds=0.5, held_blocks=8),
    step(8.0, {"a": 1, "b": 1}, seconds=0.5, held_blocks=6),
    step(9.0, {"b": 1}, seconds=1.0, held_blocks=50),
]


def test_measure_reads_decode_from_the_widest_steps_only():
    got = measure(TRACE, block_bytes=100, preemptions=3)
    assert got == {
        "decode_tokens_per_s": 4.0,
        "throughput_tokens_per_s": 8 / 9.0,
        "ttft_s": 5.5,
        "peak_running": 3,
        "kv_bytes_held": 800,
        "preemptions": 3,
        "kv_blocks_per_request": 3.5,
        "decode_requests": 2,
        "decode_steps": 2,
        "decode_step_s": 0.5,
    }


def test_a_run_without_decode_steps_measures_zero():
    got = measure(TRACE[:2], block_bytes=100, preemptions=0)
    assert got["decode_tokens_per_s"] == 0.0
    assert got["kv_bytes_held"] == 0
    assert widest_decode([]) == []
    assert measure([], block_bytes=1, preemptions=0)["throughput_tokens_per_s"] == 0.0


def request(computed: int, outputs: int, prompt: int = 8, finished: bool = False):
    return engine_run._Seen.of(
        SimpleNamespace(
            num_computed_tokens=computed,
            num_output_tokens=outputs,
            num_tokens=prompt + outputs,
            is_finished=lambda: finished,
        )
    )


@pytest.mark.parametrize(
    ("before", "after", "prompt", "tokens"),
    [
        pytest.param(request(0, 0), request(4, 0), True, {}, id="chunk"),
        pytest.param(request(4, 0), request(8, 1), True, {"r": 1}, id="last chunk"),
        pytest.param(request(8, 1), request(9, 2), False, {"r": 1}, id="decode"),
        pytest.param(request(0, 2), request(10, 3), True, {"r": 1}, id="recompute"),
        pytest.param(request(9, 2), request(0, 2), False, {}, id="preempted"),
    ],
)
def test_observe_tells_prompt_steps_from_decode_steps(before, after, prompt, tokens):
    seen = engine_run._observe(
        {"r": before}, {"r": after}, start=1.0, end=3.0, running=1, held_blocks=5
    )
    assert seen == Step(2.0, 3.0, prompt, tokens, 1, 5)


def test_observe_counts_requests_that_finish_in_the_step_as_running():
    after = request(9, 2, finished=True)
    seen = engine_run._observe(
        {"r": request(8, 1)}, {"r": after}, start=0, end=1, running=2, held_blocks=0
    )
    assert seen.running == 3


def test_medians_and_ratio():
    runs = [{"x": 1, "y": 5.0}, {"x": 9, "y": 1.0}, {"x": 2, "y": 3.0}]
    assert medians(runs) == {"x": 2, "y": 3.0}
    assert ratio(3, 2) == 1.5
    assert ratio(3, 0) is None


def figures(**changes) -> dict[str, float]:
    same = dict.fromkeys(HIGHER_IS_BETTER, 2.0)
    return {**same, "preemptions": 0, "decode_steps": 7, **changes}


def test_comparison_holds_exactly_the_documented_keys():
    entry = comparison(
        {
            "stock": figures(),
            "compressed": figures(decode_tokens_per_s=9.0),
            "limit": figures(decode_tokens_per_s=10.0),
        }
    )
    assert list(entry) == ["stock", "compressed", "limit", "ratio"]
    assert set(entry["stock"]) == set(entry["ratio"]) == set(HIGHER_IS_BETTER)
    assert set(entry["limit"]) == {*HIGHER_IS_BETTER, "ratio_to_limit"}
    assert entry["limit"]["ratio_to_limit"] == 0.9
    assert entry["ratio"]["decode_tokens_per_s"] == 4.5
    assert entry["ratio"]["preemptions"] is None


def test_losing_cases_are_named():
    worse = figures(throughput_tokens_per_s=1.0, ttft_s=3.0, preemptions=1)
    entry = comparison({"stock": figures(), "compressed": worse})
    assert lost(entry) == ["throughput_tokens_per_s", "ttft_s", "preemptions"]
    assert verdict("tight", entry) == (
        "tight: compressed loses in throughput (0.50x), time to first token (1.50x), "
        "preemptions."
    )
    ratios = list(shape_table("tight", entry).columns[-1].cells)
    assert ratios == ["1.00x", "0.50x LOST", "1.50x LOST", "1.00x", "1.00x", "- LOST"]


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_have_the_shape_and_never_repeat(name):
    traffic = SHAPES[name](640, 128, 3, 8)
    prompts = [p for one_pass in traffic.prompts(1000) for p in one_pass]
    assert len(prompts) == 3 * traffic.passes
    assert {len(prompt) for prompt in prompts} == {traffic.prompt_len}
    assert len({tuple(prompt[traffic.shared :]) for prompt in prompts}) == len(prompts)
    starts = {tuple(prompt[: traffic.shared or 16]) for prompt in prompts}
    assert len(starts) == (traffic.passes if traffic.shared else len(prompts))
    assert traffic.prompts(1000) == traffic.prompts(1000)
    assert traffic.kv_tokens >= traffic.prompt_len + traffic.max_tokens


def test_limit_is_long_decode_with_prompts_of_the_kept_length():
    assert limit(640, 128, 3, 8) == SHAPES["long_decode"](128, 128, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method nope", "method is 'nope'; allowed values: snapkv"),
        ("--method snapkv --budget 0", "0 is not at least 1"),
        ("--method snapkv --budget x", "argument --budget"),
        ("--method snapkv --kv-space -1", "-1 is not above 0"),
        (
            "--method snapkv --budget 16384",
            "--prompt-len 16384 must be above the 16384",
        ),
        (
            "--method snapkv --shapes tight,no",
            "unknown shape 'no'; allowed values: long",
        ),
        ("--method snapkv --config [1]", "--config '[1]' is not a JSON object"),
        ("--method snapkv --config {", "--config '{' is not a JSON object"),
        ('--method snapkv --config {"windw":1}', "unknown key 'windw'"),
        ("--method snapkv --model ./no/such/model", "'./no/such/model' cannot be read"),
        ("", "required: --method"),
    ],
)
def test_bad_arguments_are_one_line_and_not_zero(arguments, message, capsys):
    assert main(["bench", "shapes", *arguments.split()]) != 0
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert printed.startswith("kvcompress bench")


def test_keep_ratio_takes_the_place_of_the_default_budget():
    settings = bench.method_settings("snapkv", None, '{"keep_ratio": 0.25}')
    assert "budget" not in settings
    assert bench.kept_tokens(settings, 1000, 2) == 250
    assert bench.method_settings("snapkv", None, "{}")["budget"] == bench.DEFAULT_BUDGET


def test_the_file_has_the_documented_layout(tmp_path: Path, monkeypatch):
    ran = []

    def run_arm(name, job, arm, **_):
        ran.append((name, bool(arm), len(job.passes[0][0])))
        return arms.ArmResult(figures(), [], None, {"threads": 2, "block_size": 128})

    about = {"name": "random-weight Llama", "layers": 2}
    model = bench_model.BenchModel("m", "float32", 50, 4096, about)
    monkeypatch.setattr(bench, "bench_model", lambda location: model)
    monkeypatch.setattr(arms, "run_arm", run_arm)
    file = tmp_path / "new" / "bench.json"
    flags = "--method snapkv --prompt-len 600 --budget 200 --shapes long_decode,ample"
    assert (
        main(["bench", "shapes", *flags.split(), "--repeats", "2", "--json", str(file)])
        == 0
    )

    once = [
        ("long_decode · stock", False, 600),
        ("long_decode · compressed", True, 600),
        ("long_decode · limit", False, 200),
    ]
    assert ran[:6] == once * 2
    document = json.loads(file.read_text())
    assert list(document) == ["method", "settings", "environment", "shapes"]
    assert document["settings"]["method"]["window"] == 32
    assert document["environment"]["block_size"] == 128
    assert list(document["shapes"]) == ["long_decode", "ample"]
    assert list(document["shapes"]["ample"]) == ["stock", "compressed", "ratio"]


def test_no_compression_is_an_error_only_where_prompts_should_shrink():
    config = engine_run.KVCompressionConfig.from_dict(
        {"method": "snapkv", "budget": 256}
    )
    check = engine_run._check_proof
    check(config, [[[0] * 256]], block_size=16, layers=2, compressions=0)
    check(config, [[[0] * 999]], block_size=16, layers=2, compressions=1)
    with pytest.raises(RuntimeError, match="999 tokens should have shrunk"):
        check(config, [[[0] * 256, [0] * 999]], block_size=16, layers=2, compressions=0)
