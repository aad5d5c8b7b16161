"""Where packed weights and caches live."""

import torch
from dspark_kernels import huge_zeros
from dspark_kernels.cpu.memory import CHUNK, HUGE, LINE, Arena


def test_mappings_are_zero_and_begin_on_a_huge_page() -> None:
    memory = huge_zeros(HUGE + 5)
    assert memory.data_ptr() % HUGE == 0
    assert memory.shape == (HUGE + 5,)
    assert not bool(memory.any())
    memory[-1] = 1  # the end is ours too


def test_an_arena_hands_out_pieces_that_do_not_overlap() -> None:
    arena = Arena()
    shapes = [(3, 5), (1,), (CHUNK // 4,), (CHUNK // 2 + 7,), (2, 2), (CHUNK,)]
    pieces = [arena.empty(shape, torch.bfloat16) for shape in shapes]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % LINE == 0
        piece.fill_(number)
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape
        assert bool((piece == number).all())
