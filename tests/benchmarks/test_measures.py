"""What is measured: rounds, ratios, shapes, limits, bytes."""

import pytest
import torch

from dynmoe_hf.benchmarks.contest import Contest, Entrant, in_turn, measure, seconds
from dynmoe_hf.benchmarks.decode import Layers
from dynmoe_hf.benchmarks.layers import MEAN_EXPERTS
from dynmoe_hf.benchmarks.limits import READERS, Gemm, libraries, read
from dynmoe_hf.benchmarks.memory_use import kept_bytes, peak_bytes
from dynmoe_hf.benchmarks.shapes import FULL, QUICK, Problem, Shape, draw_routing, variable


class Time:
    """A clock that only entrants move, each run by the next number of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log = []

    def entrant(self, name: str, *durations: float, yardstick: str | None = None) -> Entrant:
        left = list(durations)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0)

        def prepare() -> None:
            self.now += 1000.0

        return Entrant(name, run, prepare, yardstick)

    def seconds(self, entrant: Entrant) -> float:
        return seconds(entrant, clock=lambda: self.now)


def test_ratios_are_those_of_each_round_and_the_first_one_is_dropped() -> None:
    time = Time()
    entrants = [
        time.entrant("base", 999.0, 1.0, 2.0, 4.0, 8.0),
        time.entrant("other", 777.0, 3.0, 2.0, 20.0, 16.0),
        time.entrant("third", 1.0, 6.0, 6.0, 10.0, 8.0, yardstick="other"),
    ]
    contest = Contest("tiny", {}, "float32", entrants, "base")
    (result,) = measure("case", contest, rounds=4, seed=0, measures={"seconds": time.seconds})
    other, third = result.scores["other"], result.scores["third"]
    assert other.ratios == [3.0, 1.0, 5.0, 2.0]
    assert other.median == 2.5 and other.quartiles == (1.75, 3.5)  # not 18 / 6, the ratio of medians
    assert other.yardstick == "base" and other.yardstick_median == 3.0
    assert third.ratios == [2.0, 3.0, 0.5, 0.5] and third.yardstick == "other"
    assert result.scores["base"].ratios == [1.0] * 4


def test_the_order_differs_between_rounds_and_is_the_same_for_a_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        time = Time()
        in_turn([time.entrant(name, *[1.0] * 7) for name in "abcd"], 6, seed, time.seconds)
        rounds = [time.log[start : start + 4] for start in range(0, 28, 4)]
        assert all(sorted(order) == list("abcd") for order in rounds)
        assert len({tuple(order) for order in rounds}) > 1
        orders.append(rounds)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("num_slots", "mean"), [(4, MEAN_EXPERTS), (16, 1), (16, 4), (16, 16), (2, None)])
def test_a_routing_has_the_stated_mean(num_slots: int, mean: float | None) -> None:
    shape = variable(FULL["a"], num_slots, mean)
    routing = draw_routing(shape, torch.float32, seed=0)
    counts = routing.num_selected
    assert counts.sum() == shape.num_pairs == round(2048 * (mean or num_slots))
    assert 1 <= counts.min() and counts.max() <= num_slots
    assert mean is None or mean in (1, 16) or len(counts.unique()) > 2
    assert torch.equal(routing.used, torch.arange(num_slots) < counts[:, None])
    assert torch.equal(routing.weights > 0, routing.used)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2048))
    assert all(
        len(set(row)) == len(row) for row in routing.expert_ids.masked_fill(~routing.used, -1).tolist() if -1 not in row
    )


def test_the_products_are_those_of_a_swiglu_layer_in_every_library() -> None:
    gemm = Gemm(40, 24, 16, torch.float32, seed=0)
    assert gemm.flops == 18 * 40 * 24 * 16
    for left, right in gemm.products.values():
        exact = left.double() @ right.double()
        for product in libraries().values():
            result = product(left, right, torch.empty(exact.shape))
            torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)
    assert set(gemm.library) == set(gemm.products) and set(gemm.library.values()) <= set(libraries())
    gemm.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reader", READERS)
def test_readers_take_every_dtype(reader: str, dtype: torch.dtype) -> None:
    read(reader, Problem.draw(QUICK["a"], dtype, 0).weights.gate_up)


def test_decoding_comes_back_to_an_expert_only_after_all_others() -> None:
    layers = Layers(Shape("b", 1, 16, 8, 12, 3), torch.float32, 2, seed=0)
    seen = []
    for _ in range(8):
        layers.advance()
        for routing in layers.routings:
            assert len(set(routing.expert_ids[0].tolist())) == 3
        seen += sorted(layers.routings[1].expert_ids[0].tolist())
    for start in range(0, 24, 12):
        assert sorted(seen[start : start + 12]) == list(range(12))


def test_the_stream_reads_the_weights_of_the_chosen_experts() -> None:
    layers = Layers(Shape("a", 5, 16, 8, 7, 2), torch.float32, 3, seed=0)
    for _ in range(9):
        layers.advance()
        expected = []
        for weights, routing in zip(layers.weights, layers.routings, strict=True):
            chosen = routing.expert_ids.unique()
            expected += [weight[chosen].sum() for weight in weights]
        pieces = layers.chosen()
        assert sum(piece.numel() * 4 for piece in pieces) == layers.bytes_read
        torch.testing.assert_close(sum(piece.sum() for piece in pieces), sum(expected), rtol=1e-4, atol=1e-4)


def test_bytes_of_a_step_that_is_counted_by_hand() -> None:
    linear = torch.nn.Linear(100, 50, bias=False)
    inputs = torch.randn(20, 100)

    def forward() -> torch.Tensor:
        return linear(inputs).relu().sum()

    # Kept: the input of the product, and the output of relu.
    assert kept_bytes(forward, linear) == 4 * (20 * 100 + 20 * 50)
    forward().backward()
    linear.zero_grad(set_to_none=True)
    held = []

    def step() -> None:
        held.append(torch.empty(1000))
        held.append(torch.empty(500))
        held.clear()
        held.append(torch.empty(200))

    assert peak_bytes(step) == 4 * 1500
