"""Writes a list of substitutes for Chinese: characters that sound alike, as typing by sound mistakes them.

    pip install pypinyin
    python benchmarks/homophones.py thucnews homophones.tsv

Every character that occurs at least twice in the training texts may become another such character of the same syllable,
whatever the tone, the most frequent first. The test texts are not looked at.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from pypinyin import lazy_pinyin

from sparring.modalities import load_data


def main() -> None:
    """Writes lines CHARACTER, TAB, OTHER OTHER ..."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("data", help="as --data has it")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    counts = Counter("".join(load_data(asked.data).strings["train"]))  # type: ignore[attr-defined]
    alike = defaultdict(list)
    for character, count in counts.most_common():
        if count > 1 and "\u4e00" <= character <= "\u9fff":
            alike[lazy_pinyin(character)[0]].append(character)
    others = {own: [c for c in same if c != own] for same in alike.values() for own in same}
    lines = sorted(f"{own}\t{' '.join(same)}\n" for own, same in others.items() if same)
    asked.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
