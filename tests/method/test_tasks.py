"""The sampler draws what a few-shot task is meant to be, whatever its sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import amaml
from amaml.tasks import quarter_turns


def labelled_characters(n: int = 12) -> amaml.Characters:
    """Images whose pixels tell which character, which drawing and which way up they are.

    Pixel (0, 0) marks the upright corner, the centre holds the character, its neighbour the
    drawing: all survive a quarter turn about the centre of an odd-sized image.
    """
    images = torch.zeros(n, 20, 5, 5, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    images[:, :, 2, 2] = torch.arange(n, dtype=torch.uint8)[:, None]
    for place in ((1, 1), (1, 3), (3, 1), (3, 3)):
        images[:, :, place[0], place[1]] = torch.arange(20, dtype=torch.uint8)
    return amaml.Characters(images, [f"A/character{i:02d}" for i in range(n)])


def read_back(x: torch.Tensor):
    """Character, drawing and turn (0 to 3) of each image of a set."""
    pixels = (x[..., 0, :, :] * 255).round().long()
    corners = torch.stack(  # where the marked corner goes, turned counter-clockwise
        [pixels[..., 0, 0], pixels[..., 4, 0], pixels[..., 4, 4], pixels[..., 0, 4]], -1
    )
    assert ((corners == 255).sum(-1) == 1).all()
    return pixels[..., 2, 2], pixels[..., 1, 1], corners.argmax(-1)


sizes = st.tuples(
    st.integers(2, 12), st.integers(1, 10), st.integers(1, 10), st.integers(1, 6), st.booleans()
)


@given(sizes, st.integers(0, 2**40))
def test_what_a_task_promises(size, seed):
    n_way, k_shot, k_query, batch, rotate = size
    sampler = amaml.TaskSampler(labelled_characters(), n_way, k_shot, k_query, rotate)
    tasks = sampler.sample(batch, torch.Generator().manual_seed(seed))
    assert tasks.support_x.shape == (batch, n_way * k_shot, 1, 5, 5)
    assert tasks.query_x.shape == (batch, n_way * k_query, 1, 5, 5)
    assert tasks.support_x.dtype == torch.float32
    assert tasks.support_y.dtype == tasks.query_y.dtype == torch.int64
    for labels, k in ((tasks.support_y, k_shot), (tasks.query_y, k_query)):
        assert torch.equal(labels, torch.arange(n_way).repeat_interleave(k).expand(batch, -1))
    s_character, s_drawing, s_turn = read_back(tasks.support_x)
    q_character, q_drawing, q_turn = read_back(tasks.query_x)
    for i in range(batch):
        drawn, turned, of_label = {}, {}, {}
        for labels, characters, drawings, turns in (
            (tasks.support_y, s_character, s_drawing, s_turn),
            (tasks.query_y, q_character, q_drawing, q_turn),
        ):
            for label, character, drawing, turn in zip(
                *(t[i].tolist() for t in (labels, characters, drawings, turns)), strict=True
            ):
                assert of_label.setdefault(label, character) == character  # labels are right
                assert turned.setdefault(label, turn) == turn  # one rotation a class
                assert drawing not in drawn.setdefault(label, set())  # support, query disjoint
                drawn[label].add(drawing)
        assert sorted(of_label) == list(range(n_way))
        assert len(set(of_label.values())) == n_way  # characters distinct
        assert all(len(drawings) == k_shot + k_query for drawings in drawn.values())
        assert rotate or set(turned.values()) == {0}


def test_the_same_generator_gives_the_same_tasks_and_another_seed_others():
    sampler = amaml.TaskSampler(labelled_characters())
    first, same, other = (
        sampler.sample(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.support_x, same.support_x)
    assert torch.equal(first.query_x, same.query_x)
    assert not torch.equal(first.support_x, other.support_x)


def test_global_random_numbers_are_neither_used_nor_touched():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    amaml.TaskSampler(labelled_characters()).sample(4, torch.Generator().manual_seed(1))
    amaml.OmniglotCNN(5, torch.Generator().manual_seed(1), filters=2)
    assert torch.equal(torch.random.get_rng_state(), before) or pytest.fail("global draw")


def test_every_character_drawing_and_turn_comes_equally_often():
    sampler = amaml.TaskSampler(labelled_characters(), n_way=5, k_shot=1, k_query=1)
    tasks = sampler.sample(4000, torch.Generator().manual_seed(0))
    for values, kinds in zip(read_back(tasks.support_x), (12, 20, 4), strict=True):
        counts = torch.bincount(values.flatten(), minlength=kinds).double()
        expected = values.numel() / kinds
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) == kinds
        assert chi_squared < kinds + 6 * (2 * kinds) ** 0.5  # mean + 6 standard deviations


def test_turns_are_those_of_rot90():
    image = torch.arange(16.0).view(4, 4)
    for q, pixel in enumerate(quarter_turns(4, 4)):
        assert torch.equal(image.flatten()[pixel].view(4, 4), torch.rot90(image, q))


def test_tasks_that_do_not_fit_together_are_refused():
    x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    for wrong in (
        (x, y, x[:1], y[:1]),  # two tasks and one
        (x, y, x, y[:, :4]),  # five examples and four
        (x, y[0], x, y),
        (x[0, :, 0], y[0], x[0, :, 0], y[0]),  # one task alone
        (x[:0], y[:0], x[:0], y[:0]),
        (x, y, x[:, :0], y[:, :0]),
    ):
        with pytest.raises(ValueError, match="must begin with the same number of tasks") as raised:
            amaml.Tasks(*wrong)
        assert f"query_y {tuple(wrong[3].shape)}" in str(raised.value)


def test_parts_of_a_meta_batch():
    tasks = amaml.TaskSampler(labelled_characters()).sample(4, torch.Generator().manual_seed(0))
    assert len(tasks) == 4 and len(tasks[1:3]) == 2 and len(tasks[-1]) == 1
    assert [len(task) for task in tasks] == [1, 1, 1, 1]  # ends where the tasks end
    for index in (-1, [3], torch.tensor(3), torch.tensor([False, False, False, True])):
        assert torch.equal(tasks[index].query_x, tasks.query_x[3:])
    for moved in (tasks.double(), tasks.to("cpu", torch.float64)):
        assert torch.equal(moved.support_x, tasks.support_x.double())
        assert torch.equal(moved.support_y, tasks.support_y)  # labels stay whole numbers
