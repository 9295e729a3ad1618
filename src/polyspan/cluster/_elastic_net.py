r"""Elastic net of many points over all others, on active sets that are exchanged until the optimum (ORGEN)."""

import numpy as np

from ._affinity import Block

# As a share of the penalty: what a coefficient's pull may miss its optimum by.
FINE = 1e-10


def elastic_net(
    X: np.ndarray, span: tuple[int, int], *, tau: float, gamma: float, n_active: int, max_rounds: int
) -> Block:
    r"""Express points ``span`` by an elastic net over all others, solved on a growing set of active points.

    Minimises :math:`\tau\lVert c\rVert_1 + \tfrac{1-\tau}{2}\lVert c\rVert_2^2 + \tfrac{\gamma_i}{2}\lVert x_i - X^\top
    c\rVert^2` with :math:`\gamma_i = \gamma\tau / \max_{j\ne i}|x_j^\top x_i|`. With :math:`\delta = \gamma_i(x_i -
    X^\top c)` for the optimum on a set of points, the optimum over all points lies on those with
    :math:`|x_j^\top\delta| > \tau` (the oracle region); so the set is exchanged for its support and the points found
    there until there are no others. The objective falls at each exchange, so that no set comes twice.
    """
    start, stop = span
    points, own = X[start:stop], np.arange(start, stop)
    b, n = len(points), len(X)
    slack = 1 + float(np.finfo(X.dtype).eps) ** 0.5
    fit = np.abs(points @ X.T)
    fit[np.arange(b), own] = -1
    strongest = fit.max(axis=1).astype(np.float64)
    weight = strongest / (gamma * tau)
    first = min(n_active, n - 1)
    sets = list(np.argpartition(-fit, first - 1, axis=1)[:, :first])
    codes = [np.zeros(first) for _ in range(b)]
    at, rounds = np.flatnonzero(strongest > np.finfo(X.dtype).eps * np.square(points).sum(axis=1)), 0
    del fit
    while len(at) and rounds < max_rounds:
        rounds += 1
        rest = np.empty((len(at), X.shape[1]), X.dtype)
        for slot, i in enumerate(at):
            A, x = X[sets[i]].astype(np.float64), points[i].astype(np.float64)
            codes[i] = solve_elastic_net(A @ A.T, A @ x, weight[i] * tau, weight[i] * (1 - tau), codes[i])
            rest[slot] = x - codes[i] @ A
        pull = np.abs(rest @ X.T)
        pull[np.arange(len(at)), own[at]] = -1
        beyond = pull > (tau * slack * weight[at]).astype(X.dtype)[:, None]
        later = []
        for slot, i in enumerate(at):
            outside = np.flatnonzero(beyond[slot])
            fresh = outside[~np.isin(outside, sets[i])]
            if not len(fresh):
                continue
            if len(fresh) > n_active:
                fresh = fresh[np.argpartition(-pull[slot][fresh], n_active - 1)[:n_active]]
            if rounds < max_rounds:
                used = codes[i] != 0
                sets[i] = np.concatenate([sets[i][used], fresh])
                codes[i] = np.concatenate([codes[i][used], np.zeros(len(fresh))])
            later.append(i)
        at = np.array(later, dtype=np.intp)
    rows, columns, values = np.repeat(own, [len(a) for a in sets]), np.concatenate(sets), np.concatenate(codes)
    keep = values != 0
    return Block(rows[keep], columns[keep], values[keep], rounds, len(at))


def solve_elastic_net(G: np.ndarray, q: np.ndarray, l1: float, l2: float, start: np.ndarray) -> np.ndarray:
    r"""Minimise :math:`\tfrac12 c^\top Gc - q^\top c + l_1\lVert c\rVert_1 + \tfrac{l_2}2\lVert c\rVert^2` exactly.

    An active-set method: under fixed signs the optimum is a linear system; the way there ends where a coefficient meets
    0, which leaves; once there is none, the atom whose pull exceeds the penalty most comes in. The objective falls at
    each step. ``start`` (m,) is any point, best near the optimum.
    """
    m = len(q)
    # Dependent atoms have no unique optimum without an l2 penalty; this one chooses without being felt.
    ridge = max(l2, 1e-13 * float(np.max(np.diag(G))))
    on = np.flatnonzero(start)
    now, sign = start[on], np.sign(start[on])
    barred = np.zeros(m, dtype=bool)
    newest = -1
    for _ in range(20 * (m + 10)):
        if len(on):
            inner = G[on[:, None], on]
            inner.flat[:: len(on) + 1] += ridge
            goal = np.linalg.solve(inner, q[on] - l1 * sign)
            wrong = goal * sign <= 0
            if wrong.any():
                share = np.where(wrong, now / np.where(wrong, now - goal, 1), 1)
                leaving = int(share.argmin())
                if share[leaving] == 0 and on[leaving] == newest:
                    # By rounding alone it came in.
                    barred[newest] = True
                now = now + share[leaving] * (goal - now)
                stay = np.arange(len(on)) != leaving
                on, now, sign = on[stay], now[stay], sign[stay]
                continue
            now = goal
        pull = q - G[:, on] @ now
        excess = np.abs(pull)
        excess[on] = 0
        excess[barred] = 0
        newest = int(excess.argmax())
        if excess[newest] <= l1 * (1 + FINE):
            break
        on, now = np.append(on, newest), np.append(now, 0.0)
        sign = np.append(sign, np.sign(pull[newest]))
    codes = np.zeros(m)
    codes[on] = now
    return codes
