"""ZipIt! transcribed plainly: lists of groups, every pair compared anew before each merge, explicit matrices."""

import numpy as np

Group = list[tuple[int, int]]  # (model, unit)


def models_of(group: Group) -> set[int]:
    return {model for model, _ in group}


def zip_groups(similarity: np.ndarray, models: int, beta: float, alpha: float) -> list[Group]:
    """The groups that greedy merging leaves; `similarity` is over all models' units, the first model's first."""
    total = len(similarity)
    units = total // models
    groups: list[Group] = [[(index // units, index % units)] for index in range(total)]
    pairs = {(a, b): float(similarity[a, b]) for a in range(total) for b in range(total) if a < b}
    alive = list(range(total))
    budget = [int(beta * (total - units) / models + 1e-9)] * models

    def beyond(a: int, b: int) -> bool:
        return any(budget[model] <= 0 for model in models_of(groups[a]) & models_of(groups[b]))

    while len(alive) > units:
        allowed = [pair for pair in pairs if not beyond(*pair)] or list(pairs)
        a, b = max(allowed, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        for model in models_of(groups[a]) & models_of(groups[b]):
            budget[model] -= 1
        groups[a] = groups[a] + groups[b]
        alive.remove(b)
        for other in alive:
            if other != a:
                near = min(pairs[tuple(sorted((a, other)))], pairs[tuple(sorted((b, other)))])
                if models_of(groups[a]) & models_of(groups[other]):
                    near = min(near, alpha * near)
                pairs[tuple(sorted((a, other)))] = near
        pairs = {pair: near for pair, near in pairs.items() if b not in pair}
    return [groups[a] for a in alive]


def merge_matrices(groups: list[Group], models: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """M [models, groups, units], the means of groups, and U [models, units, groups], their members."""
    into, back = np.zeros((models, len(groups), units)), np.zeros((models, units, len(groups)))
    for row, group in enumerate(groups):
        for model, unit in group:
            into[model, row, unit] = 1 / len(group)
            back[model, unit, row] = 1
    return into, back


def zip_mlp(
    weights: list[list[np.ndarray]], biases: list[list[np.ndarray]], groups: list[list[Group]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The merged multilayer perceptrons: Σ_m M_m W_m U_m in hidden layers, the mean over models in the last."""
    models, depth = len(weights), len(weights[0])
    merged_weights, merged_biases = [], []
    for layer in range(depth):
        weight = bias = 0.0
        for model in range(models):
            W, b = weights[model][layer], biases[model][layer]
            if layer > 0:
                W = W @ merge_matrices(groups[layer - 1], models, W.shape[1])[1][model]
            if layer < depth - 1:
                M = merge_matrices(groups[layer], models, W.shape[0])[0][model]
            else:
                M = np.eye(W.shape[0]) / models
            weight, bias = weight + M @ W, bias + M @ b
        merged_weights.append(weight)
        merged_biases.append(bias)
    return merged_weights, merged_biases
