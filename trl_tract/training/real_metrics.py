"""What is logged of the rationales: means over batches and ranks. Knows nothing of the loss or the trainer."""

import torch

# Of each rationale, in the columns of a table: its loss, gold score, expected score, squared error, grid mass, whether
# a score can follow (1 or 0), how many tokens were sampled, whether some of them were replaced.
LOSS, GOLD, EXPECTED, SQUARED_ERROR, GRID_MASS, SCORED, LENGTH, REWRITTEN = range(8)


class RolloutMetrics:
    """Running sums of one mode, training or evaluation."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.rows: list[torch.Tensor] = []
        self.spreads: list[torch.Tensor] = []

    def add(self, table: torch.Tensor, num_generations: int) -> None:
        """Add what was generated together on all ranks.

        Args:
            table: A row for each rationale, groups one behind the other, `(N, 8)`; see the columns above.
        """
        table = table.detach().double().cpu()
        self.rows.append(table)
        groups = table.view(-1, num_generations, table.shape[1])
        for group in groups if num_generations > 1 else ():
            expected = group[group[:, SCORED] > 0, EXPECTED]
            if len(expected) > 1:
                self.spreads.append(expected.std())

    def means(self) -> dict[str, float]:
        """The means since the last call, by the names under which they are logged; none where nothing was generated."""
        if not self.rows:
            return {}
        table, spreads = torch.cat(self.rows), self.spreads
        self.clear()
        scored = table[table[:, SCORED] > 0]
        means = {
            "rationale/length": float(table[:, LENGTH].mean()),
            "rationale/no_score": float(1 - table[:, SCORED].mean()),
            "rationale/rewritten": float(table[:, REWRITTEN].mean()),
            "loss/expected": float(table[:, LOSS].mean()),
        }
        if len(scored):
            error = scored[:, EXPECTED] - scored[:, GOLD]
            means |= {
                "score/expected": float(scored[:, EXPECTED].mean()),
                "score/rmse": float(scored[:, SQUARED_ERROR].mean().sqrt()),
                "score/mae": float(error.abs().mean()),
                "score/grid_mass": float(scored[:, GRID_MASS].mean()),
            }
        if spreads:
            means["score/spread"] = float(torch.stack(spreads).mean())
        return means
