"""As `sft_lora`, with every parameter trained: `python benchmarks/sft_full.py --tokenizer FOLDER --data FILE [--sizes 15M,120M] [--quick]`.

target: 2 x TRL's defaults
"""

from __future__ import annotations

import sft_lora

if __name__ == "__main__":
    sft_lora.CASES = {size: (examples, held, turns, 2.0) for size, (examples, held, turns, _) in sft_lora.CASES.items()}
    sft_lora.BEST = sft_lora.MEMORY = None  # no targets but that against the defaults
    sft_lora.main("full")
