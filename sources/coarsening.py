"""From a triangle mesh to 96 fine and 48 dense points (paper section 3, appendix B, Fig. 9).

Heavy Edge Matching (Graclus; Defferrard et al. 2016, Pose2Mesh) merges neighbouring vertices pair
by pair until 96 clusters are left, and a perfect matching pairs these into 48. A balanced
assignment then gives each of the 16 joints that own a token exactly three of the 48. """

import networkx as nx
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which would want a display

from hipart import JOINT_NAMES, PART_JOINT


def vertex_areas(vertices, faces):
    """Each vertex's third of its triangles' areas, [V]."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    return np.bincount(faces.ravel(), np.repeat(area / 3, 3), minlength=len(vertices))


def mesh_edges(faces):
    """Undirected edges [E, 2] of a triangle mesh, each once."""
    return np.unique(
        np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1),
        axis=0,
    )


def contract(edges, weight, label):
    """Merge the nodes of a graph that share a label; parallel edges add up, loops go."""
    e = np.sort(label[edges], axis=1)
    keep = e[:, 0] != e[:, 1]
    e, index = np.unique(e[keep], axis=0, return_inverse=True)
    return e, np.bincount(index.ravel(), weight[keep], minlength=len(e))


def match_pass(edges, weight, mass, order, target, cap):
    """One pass of Heavy Edge Matching -> label [n] of the merged nodes; stops when `target` nodes
    are left.

    A node is merged with the free neighbour of largest normalised cut weight w_ij (1/m_i + 1/m_j),
    if the two together stay below `cap`. """
    neighbours = [[] for _ in mass]
    for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True):
        neighbours[i].append((j, w))
        neighbours[j].append((i, w))
    mass, label, left = mass.tolist(), list(range(len(mass))), len(mass)
    free = [True] * left
    for i in order:
        if left == target:
            break
        if free[i]:
            options = [(w * (1 / mass[i] + 1 / mass[j]), j) for j, w in neighbours[i]
                       if free[j] and mass[i] + mass[j] <= cap]  # fmt: skip
            if options:
                j = max(options)[1]
                free[i] = free[j] = False
                label[j] = i
                left -= 1
    return np.unique(label, return_inverse=True)[1]


def coarsen(vertices, faces, joints, sizes=(192, 96, 48), weighting="joint", tries=6):
    """Coarsen a mesh into nested clusters and tie them to joints (paper section 3, Fig. 9; Graclus,
    Pose2Mesh).

    vertices [V, 3], faces [F, 3], joints [16, 3]: the joints that own parts, in part order, all in
    rest pose. Heavy Edge Matching is repeated until exactly sizes[0], sizes[1], ... clusters are
    left; the last level pairs the one before it by a maximum-weight perfect matching, because no
    pass of matching lands on it. weighting "plain": Graclus as it is: mass = degree, nodes visited
    at random (good for SMPL's even mesh). weighting "joint": mass = area / area of the region
    nearest to the same joint, lightest first, clusters at most 1.5 x the mean: every joint gets its
    share, however densely its hands or face are meshed (the open body needs it). The best of
    `tries` seeds by assignment distance is kept.

    Returns a dict: size -> label [V] (row of that level's point, -1 outside the largest component),
    and "distance": mean distance from a point of the last level to its joint. Rows: the r points of
    joint i are r*i, ..., r*i + r - 1 in the last level; the two halves of its point k are 2k and 2k
    + 1 in the level before. """
    if weighting not in ("joint", "plain"):
        raise ValueError(f"weighting must be 'joint' or 'plain', found {weighting!r}.")
    if sizes[-1] * 2 != sizes[-2] or sizes[-1] % len(joints):
        raise ValueError(
            f"The last of sizes {sizes} must be half the one before it and a multiple of {len(joints)}."
        )
    edges = mesh_edges(faces)
    used = np.array(sorted(max(nx.connected_components(nx.Graph(edges.tolist())), key=len)))
    if len(used) < sizes[0]:
        raise ValueError(
            f"The largest component has {len(used)} vertices, too few for {sizes[0]} clusters."
        )
    new = np.full(len(vertices), -1)
    new[used] = np.arange(len(used))
    edges = new[edges[new[edges[:, 0]] >= 0]]
    points = vertices[used]
    area = np.maximum(vertex_areas(vertices, faces)[used], 1e-12)
    if weighting == "joint":
        nearest = np.linalg.norm(points[:, None] - joints, axis=-1).argmin(1)
        mass = area / np.bincount(nearest, area, minlength=len(joints))[nearest]
    else:
        mass = np.bincount(edges.ravel(), minlength=len(used)).astype(float)

    best = None
    for seed in range(tries):
        levels = _cluster(edges, mass, sizes, weighting, np.random.default_rng(seed))
        if levels is None:
            continue
        centre = np.stack([np.bincount(levels[-1], area * points[:, k]) for k in range(3)], 1)
        centre /= np.bincount(levels[-1], area)[:, None]
        distance = np.linalg.norm(centre[:, None] - joints, axis=-1)  # [48, 16]
        part = assign_parts(distance)
        mean = distance[np.arange(len(part)), part].mean()
        if best is None or mean < best[0]:
            best = mean, levels, part, centre
    if best is None:
        raise ValueError(
            f"No perfect pairing of {sizes[-2]} clusters was found in {tries} tries: raise `tries`."
        )

    mean, levels, part, centre = best
    rank = np.lexsort((-centre[:, 2], part))  # by part, then from top to bottom
    row = np.argsort(rank)[levels[-1]]  # of every vertex in the last level
    result = {"distance": float(mean)}
    for size, level in zip(sizes[::-1], levels[::-1], strict=True):
        pairs, index = np.unique(np.stack([row, level], 1), axis=0, return_inverse=True)
        row = index.ravel()  # sorted by the coarser level's row: nested levels stay side by side
        assert len(pairs) == size
        result[size] = np.full(len(vertices), -1)
        result[size][used] = row
    return result


def _cluster(edges, mass, sizes, weighting, rng):
    """Labels of every vertex at each level, or None if the last level has no perfect matching."""
    n_vertices, weight = len(mass), np.ones(len(edges))
    label, levels = np.arange(n_vertices), []
    for size in sizes[:-1]:
        slack = 1.5
        while len(mass) > size:
            if weighting == "joint":
                order = np.argsort(mass * rng.uniform(0.9, 1.1, len(mass)))
                cap = slack * mass.sum() / max(size, len(mass) // 2)
            else:
                order, cap = rng.permutation(len(mass)), np.inf
            merged = match_pass(edges, weight, mass, order.tolist(), size, cap)
            if merged.max() + 1 > 0.95 * len(mass):
                slack *= 1.2  # stuck: the light neighbours are used up
            edges, weight = contract(edges, weight, merged)
            mass, label = np.bincount(merged, mass), merged[label]
        levels.append(label)
    graph = nx.Graph()
    graph.add_weighted_edges_from(
        (i, j, w * (1 / mass[i] + 1 / mass[j]))
        for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True)
    )
    pairs = sorted(tuple(sorted(p)) for p in nx.max_weight_matching(graph, maxcardinality=True))
    if len(pairs) != sizes[-1]:
        return None
    half = np.empty(sizes[-2], int)
    for k, (i, j) in enumerate(pairs):
        half[i] = half[j] = k
    return [*levels, half[label]]


def level_matrix(label, vertex_weight):
    """The level as a matrix R [J, V] with one entry a column: rows are weighted means of their
    clusters' vertices."""
    matrix = np.zeros((label.max() + 1, len(label)))
    used = np.flatnonzero(label >= 0)
    matrix[label[used], used] = vertex_weight[used]
    return matrix / matrix.sum(1, keepdims=True)


def assign_parts(cost):
    """Balanced assignment: cost [n, m] -> owner [n] in 0..m-1, each exactly n/m times, minimum
    total cost.

    A min-cost flow: every row sends one unit, every column takes n/m; integer costs (9 digits) make
    it exact. """
    n, m = cost.shape
    if n % m:
        raise ValueError(f"{n} points cannot be shared equally among {m} joints.")
    integer = np.rint(cost / np.abs(cost).max() * 10**9).astype(int)
    graph = nx.DiGraph()
    graph.add_nodes_from((i, {"demand": -1}) for i in range(n))
    graph.add_nodes_from((n + j, {"demand": n // m}) for j in range(m))
    graph.add_weighted_edges_from(
        (i, n + j, int(integer[i, j])) for i in range(n) for j in range(m)
    )
    flow = nx.min_cost_flow(graph)
    return np.array([next(j for j in range(m) if flow[i][n + j]) for i in range(n)])


# --------------------------------------------------------------------------------------------------
def draw_coarsening(path, vertices, faces, joints, levels, area):
    """The paper's Fig. 9: the mesh, its 96 and 48 points, and the 16 joints, coloured by part;
    front view."""
    colours = colormaps["tab20"](np.arange(16))  # of parts
    fig = Figure(figsize=(18, 8))
    axes = fig.subplots(1, 4, sharex=True, sharey=True)
    for ax, size in zip(axes, (None, 96, 48, 16), strict=True):
        used = levels[48] >= 0
        part = levels[48][used] // 3
        ax.scatter(
            *vertices[used][:, [0, 2]].T,
            s=1.5,
            color=colours[part],
            alpha=0.9 if size is None else 0.15,
        )
        if size == 16:
            ax.scatter(
                *joints[list(PART_JOINT)][:, [0, 2]].T,
                s=150,
                color=colours,
                edgecolor="k",
                zorder=3,
            )
            for i, joint in enumerate(PART_JOINT):
                text = f"{i} {JOINT_NAMES[joint]}"
                ax.annotate(
                    text,
                    joints[joint, [0, 2]],
                    (7, 7),
                    textcoords="offset points",
                    fontsize=8,
                    zorder=4,
                )
        elif size:
            points = level_matrix(levels[size], area) @ vertices
            part = np.arange(size) // (size // 16)
            for p, i in zip(points, part, strict=True):
                ax.plot(*np.stack([p, joints[PART_JOINT[i]]])[:, [0, 2]].T, color=colours[i], lw=1)
            ax.scatter(*points[:, [0, 2]].T, s=50, color=colours[part], edgecolor="k", zorder=3)
        titles = {None: f"{used.sum()} vertices, by part", 16: "16 parts and their joints"}
        ax.set_title(titles.get(size, f"{size} points"))
        ax.set_aspect("equal")
        ax.axis("off")
    fig.suptitle(
        f"Coarsening: mean distance of the 48 points from their joint {1000 * levels['distance']:.0f} mm"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=70)
