"""Numbers in messages."""


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `1,200 shards`: the noun in the plural where needed."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
