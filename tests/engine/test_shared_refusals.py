"""Models that share KV, with a config.json that makes no sense: refused at start."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from tests.engine.conftest import engine
from tests.engine.shared_models import make

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("lckv", {"layer_types": "0_4_x_4_4_5"}, "layer_types has 'x'"),
        ("lckv", {"layer_types": "0_4_4_4_5"}, "layer_types has 5 entries"),
        ("lckv", {"layer_types": "0_4_4_4_4_9"}, "layer 5 reads layer 9"),
        ("lckv", {"layer_types": "0_2_4_4_4_5"}, "must read its own"),
        ("opt", {"target_layer": 2}, "layer_types has its role 2 elsewhere"),
        ("cla2", {"cla_share_factor": 0}, "cla_share_factor=0 must be at least 1"),
        ("cla2", {"cla_map": "some"}, "cla_map='some' is none of every"),
        ("yoco", {"n_attn_kv_heads": 3}, "n_attn_kv_heads=3 does not divide"),
        ("yoco", {"n_layers": 5}, "n_layers=5 must be even"),
    ],
)
def test_senseless_configurations(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = make(name, tmp_path)
    written = tmp_path / "config.json"
    config = json.loads(written.read_text())
    assert set(changes) <= set(config)
    written.write_text(json.dumps({**config, **changes}))
    errors = (ValueError, StrictDataclassClassValidationError)
    with pytest.raises(errors, match=said), engine(made.path):
        pass
