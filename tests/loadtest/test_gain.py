"""The README's figures are those of docs/benchmarks.md."""

from loadtest import gain

README = (gain.ROOT / "README.md").read_text()


def test_the_table_of_the_readme_is_that_of_the_benchmarks() -> None:
    assert gain.table() in README


def test_the_ratios_are_those_that_the_benchmarks_state() -> None:
    stated = [(row[3], row[7]) for row in gain.table_after(gain.BENCHMARKS.read_text(), gain.BESIDE_VLLM)]
    rows = gain.beside_vllm()
    assert [users for users, *_ in rows] == [1, 4, 8, 16, 32]
    for row, (greedy, sampled) in zip(rows, stated, strict=True):
        assert abs(row.greedy / row.greedy_vllm - float(greedy.split()[0].strip("*"))) < 0.011
        assert abs(row.sampled / row.sampled_vllm - float(sampled.split()[0].strip("*"))) < 0.011
