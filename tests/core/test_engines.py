from typing import Any

import pytest

from registry.core.engines import ENGINES, SOURCES, profiles
from tests.core.test_adapter import PLAIN, Q, spec

EVERYWHERE = dict.fromkeys(ENGINES, True)


def test_every_engine_has_a_source() -> None:
    assert set(SOURCES) == set(ENGINES) == {"vllm", "sglang", "lorax", "peft", "llama.cpp"}


def test_a_plain_adapter_loads_everywhere() -> None:
    assert {name: verdict.loads for name, verdict in profiles(spec()).items()} == EVERYWHERE


def sized(rank: int) -> dict[str, tuple[int, ...]]:
    return {f"{Q}.lora_A.weight": (rank, 2048), f"{Q}.lora_B.weight": (2048, rank)}


@pytest.mark.parametrize(
    ("shapes", "config", "without", "word"),
    [
        (sized(1024), {"r": 1024}, {"vllm", "lorax"}, "rank 1024 is over its maximum of"),
        (sized(256), {"r": 256}, {"lorax"}, "over its maximum of 128"),
        (
            PLAIN | {f"{Q}.lora_magnitude_vector": (8,)}, {"use_dora": True}, {"vllm", "sglang", "lorax", "llama.cpp"},
            "DoRA",
        ),
        (PLAIN | {f"{Q}.bias": (8,)}, {"bias": "all"}, {"vllm", "sglang", "lorax", "llama.cpp"}, "biases"),
        (
            PLAIN | {"score.weight": (2, 16)}, {"modules_to_save": ["score"]}, {"vllm", "sglang", "lorax", "llama.cpp"},
            "modules_to_save",
        ),
        (
            {"transformer.h.0.attn.c_attn.lora_A.weight": (4, 8), "transformer.h.0.attn.c_attn.lora_B.weight": (24, 4)},
            {}, {"sglang"}, "does not adapt c_attn",
        ),
        (PLAIN, {"peft_type": "IA3"}, {"vllm", "sglang", "lorax", "llama.cpp"}, "IA3"),
    ],
)  # fmt: skip
def test_what_an_engine_does_not_take_is_its_reason(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], without: set[str], word: str
) -> None:
    found = profiles(spec(shapes, **config))
    assert {name for name, verdict in found.items() if not verdict.loads} == without
    assert all(word in " ".join(found[name].reasons) for name in without)
