"""Figures of what was routed, as functions of the Routings that a model returns."""

from torch import Tensor

from dynmoe_hf.model.routing import Routing


def pair_usage(first: Routing, second: Routing) -> Tensor:
    """How often the two banks of a cartesian layer are used as which pair (CartesianMoE, arXiv 2410.16077).

    `M[i, j]` is the mean over tokens of `1[i in S_A] 1[j in S_B] / (k_A k_B)`: of the pairs that a token composes, the
    share that is (i, j). All of it sums to 1; its row sums and column sums are the shares of the sub-experts in the
    choices of bank A and of bank B, which the load-balance loss evens out. No loss looks at the pairs.

    Args:
        first: the Routing of bank A, `output.routing[2 * layer]` where every layer is cartesian.
        second: the Routing of bank B in the same layer and call.

    Returns:
        (E, E) float32. Tokens that use no expert, as padding, do not count; without any other it is 0.

    Raises:
        ValueError: the two are not about the same tokens.
    """
    if len(first.expert_ids) != len(second.expert_ids):
        raise ValueError(
            f"pair_usage needs both banks of one layer in one call, got {len(first.expert_ids)} and "
            f"{len(second.expert_ids)} tokens."
        )
    shares = [routing.selected() / routing.num_selected.clamp_min(1)[:, None] for routing in (first, second)]
    num_tokens = ((first.num_selected > 0) & (second.num_selected > 0)).sum()
    return shares[0].T @ shares[1] / num_tokens.clamp_min(1)
