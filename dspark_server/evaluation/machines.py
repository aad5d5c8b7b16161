"""The machines of `configs/profiles/`: served pairs on the devices that `configs/serve/` names for them."""

from dspark_server.evaluation.deepseek import FLASH, PRO
from dspark_server.evaluation.roofline import (
    EIGHT_B200,
    EIGHT_H100,
    EIGHT_H200,
    FOUR_H200,
    H100,
    H200,
    QWEN3_8B,
    SIXTEEN_H200,
    TYPICAL_CONTEXT,
    Machine,
)

FLASH_PAIR, PRO_PAIR = FLASH.pair(TYPICAL_CONTEXT), PRO.pair(TYPICAL_CONTEXT)

MACHINES = {
    "qwen3-8b-h100": (QWEN3_8B, H100),
    "qwen3-8b-h200": (QWEN3_8B, H200),
    "deepseek-v4-flash-8xh100": (FLASH_PAIR, EIGHT_H100),
    "deepseek-v4-flash-4xh200": (FLASH_PAIR, FOUR_H200),
    "deepseek-v4-flash-8xh200": (FLASH_PAIR, EIGHT_H200),
    "deepseek-v4-pro-16xh200": (PRO_PAIR, SIXTEEN_H200),
    "deepseek-v4-pro-8xb200": (PRO_PAIR, EIGHT_B200),
}


def derive(name: str) -> Machine:
    """The machine called `name` in `configs/profiles/`."""
    pair, accelerator = MACHINES[name]
    return pair.on(accelerator)
