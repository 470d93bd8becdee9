"""From a triangle mesh to 96 fine and 48 dense points (paper section 3, appendix B, Fig. 9).

Heavy Edge Matching (Graclus, Dhillon et al. 2007; for body meshes Pose2Mesh, Choi et al. 2020)
merges neighbouring vertices pair by pair, until 96 clusters are left. A perfect matching pairs
these into 48, and a balanced assignment gives each of the 16 joints that own a part three of them.
`coarsen` does it all; `level_matrix` makes points out of vertices.
"""

import networkx as nx
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which may want a display

from hipart import JOINT_NAMES, PART_JOINT


def vertex_areas(vertices, faces):
    """The share of each vertex in the mesh's area, [V]: a third of its triangles."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    return np.bincount(faces.ravel(), np.repeat(area / 3, 3), minlength=len(vertices))


def mesh_edges(faces):
    """Undirected edges [E, 2] of a triangle mesh with faces [F, 3], each once."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return np.unique(np.sort(edges, axis=1), axis=0)


def contract(edges, weight, label):
    """Merge the nodes of a graph that share a label -> edges and weights of the smaller graph.

    The weights of edges that become parallel add up; edges within one node go.
    """
    merged = np.sort(label[edges], axis=1)
    keep = merged[:, 0] != merged[:, 1]
    merged, index = np.unique(merged[keep], axis=0, return_inverse=True)
    return merged, np.bincount(index.ravel(), weight[keep], minlength=len(merged))


def match_pass(edges, weight, mass, order, target, cap):
    """One pass of Heavy Edge Matching -> label [n] of the merged nodes.

    The n nodes are visited in `order`. A node that is still free is merged with the free neighbour
    of the largest normalised cut weight w_ij (1 / m_i + 1 / m_j), if the mass of both together is
    at most `cap`. The pass stops when `target` nodes are left.
    """
    neighbours = [[] for _ in mass]
    for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True):
        neighbours[i].append((j, w))
        neighbours[j].append((i, w))
    mass, label, left = mass.tolist(), list(range(len(mass))), len(mass)
    free = [True] * left
    for i in order:
        if left == target:
            break
        if not free[i]:
            continue
        options = [
            (w * (1 / mass[i] + 1 / mass[j]), j)
            for j, w in neighbours[i]
            if free[j] and mass[i] + mass[j] <= cap
        ]
        if options:
            j = max(options)[1]
            free[i] = free[j] = False
            label[j] = i
            left -= 1
    return np.unique(label, return_inverse=True)[1]


def coarsen(vertices, faces, joints, sizes=(192, 96, 48), weighting="joint", tries=6):
    """Coarsen a mesh into nested clusters and tie these to joints.

    vertices [V, 3] and faces [F, 3] are the mesh in its rest pose, joints [16, 3] the joints that
    own the parts, in the order of the parts. `sizes` are the numbers of clusters of the levels.

    weighting "plain" is Graclus as it is: a node's mass is its degree, and nodes are visited at
    random. That suits SMPL's even mesh. With "joint", every joint gets its share, however densely
    its hands or its face are meshed, which the open body needs: a node's mass is its part of the
    region nearest to the same joint, the lightest nodes are visited first, and no cluster exceeds
    1.5 times the mean. Of `tries` random seeds, the one whose points lie nearest to their joints
    is taken.

    Returns a dict: for each size the cluster of every vertex, [V] (-1 outside of the mesh's largest
    component), and under "distance" the mean distance from a point of the last level to its joint.
    The 48 clusters are in the order of the parts, 3i to 3i + 2 being those of joint i, and cluster
    k consists of clusters 2k and 2k + 1 of the level with 96.

    Raises ValueError if the mesh is too small, or if its clusters cannot be paired.
    """
    if weighting not in ("joint", "plain"):
        raise ValueError(f"weighting must be 'joint' or 'plain', found {weighting!r}.")
    if sizes[-1] * 2 != sizes[-2] or sizes[-1] % len(joints):
        raise ValueError(f"The last of sizes {sizes} must be half the one before it and "
                         f"a multiple of {len(joints)}.")
    used, edges = _largest_component(len(vertices), faces)
    if len(used) < sizes[0]:
        raise ValueError(f"The largest component has {len(used)} vertices, "
                         f"too few for {sizes[0]} clusters.")
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
        raise ValueError(f"No perfect pairing of {sizes[-2]} clusters was found in {tries} tries: "
                         "raise `tries`.")

    mean, levels, part, centre = best
    order = np.lexsort((-centre[:, 2], part))  # by part, and within a part from top to bottom
    row = np.argsort(order)[levels[-1]]  # of every vertex, at the last level
    result = {"distance": float(mean)}
    for size, level in zip(sizes[::-1], levels[::-1], strict=True):
        # Numbering by (row of the coarser level, cluster) keeps the halves of a cluster together.
        pairs, index = np.unique(np.stack([row, level], 1), axis=0, return_inverse=True)
        row = index.ravel()
        assert len(pairs) == size
        result[size] = np.full(len(vertices), -1)
        result[size][used] = row
    return result


def _largest_component(n_vertices, faces):
    """The vertices of the largest connected part [V'], and its edges, numbered within it.

    The open body's eyes and teeth are loose parts; no cluster may leap from one to another.
    """
    edges = mesh_edges(faces)
    components = nx.connected_components(nx.Graph(edges.tolist()))
    used = np.array(sorted(max(components, key=len)))
    new = np.full(n_vertices, -1)
    new[used] = np.arange(len(used))
    return used, new[edges[new[edges[:, 0]] >= 0]]


def _cluster(edges, mass, sizes, weighting, rng):
    """The cluster of every vertex at each level, or None if the last has no perfect matching."""
    weight = np.ones(len(edges))
    label, levels = np.arange(len(mass)), []
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
                slack *= 1.2  # the pass is stuck, since all light neighbours are used up
            edges, weight = contract(edges, weight, merged)
            mass, label = np.bincount(merged, mass), merged[label]
        levels.append(label)

    # A pass of matching leaves some nodes alone, so it never halves a graph exactly. The last level
    # must do so, and takes the perfect matching of the largest weight.
    graph = nx.Graph()
    for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True):
        graph.add_edge(i, j, weight=w * (1 / mass[i] + 1 / mass[j]))
    pairs = sorted(tuple(sorted(p)) for p in nx.max_weight_matching(graph, maxcardinality=True))
    if len(pairs) != sizes[-1]:
        return None
    half = np.empty(sizes[-2], int)
    for k, (i, j) in enumerate(pairs):
        half[i] = half[j] = k
    return [*levels, half[label]]


def level_matrix(label, vertex_weight):
    """A level as a matrix R [J, V]: row j makes point j, the weighted mean of its vertices.

    label [V] is the cluster of every vertex (-1: none), vertex_weight [V] for example its area.
    """
    matrix = np.zeros((label.max() + 1, len(label)))
    used = np.flatnonzero(label >= 0)
    matrix[label[used], used] = vertex_weight[used]
    return matrix / matrix.sum(1, keepdims=True)


def assign_parts(cost):
    """Balanced assignment at the least total cost: cost [n, m] -> owner [n], each of 0..m-1 exactly
    n / m times. Raises ValueError if m does not divide n.

    It is a minimum-cost flow: every row sends one unit, and every column takes n / m. The costs
    become integers of nine digits, with which the algorithm is exact.
    """
    n, m = cost.shape
    if n % m:
        raise ValueError(f"{n} points cannot be shared equally among {m} joints.")
    integer = np.rint(cost / np.abs(cost).max() * 10**9).astype(int)
    graph = nx.DiGraph()
    graph.add_nodes_from((i, {"demand": -1}) for i in range(n))
    graph.add_nodes_from((n + j, {"demand": n // m}) for j in range(m))
    for i in range(n):
        graph.add_weighted_edges_from((i, n + j, int(integer[i, j])) for j in range(m))
    flow = nx.min_cost_flow(graph)
    return np.array([next(j for j in range(m) if flow[i][n + j]) for i in range(n)])


def draw_coarsening(path, vertices, faces, joints, levels, area):
    """The paper's Fig. 9 as a picture: the mesh, its 96 and 48 points, and the 16 joints, all
    coloured by part and seen from the front. levels: what `coarsen` returns; joints [17, 3]."""
    colours = colormaps["tab20"](np.arange(16))  # of the parts
    used = levels[48] >= 0
    fig = Figure(figsize=(18, 8))
    axes = fig.subplots(1, 4, sharex=True, sharey=True)
    for ax, size in zip(axes, (None, 96, 48, 16), strict=True):
        mesh, part = vertices[used][:, [0, 2]], levels[48][used] // 3
        ax.scatter(*mesh.T, s=1.5, color=colours[part], alpha=0.9 if size is None else 0.15)
        if size == 16:
            owners = joints[list(PART_JOINT)][:, [0, 2]]
            ax.scatter(*owners.T, s=150, color=colours, edgecolor="k", zorder=3)
            for i, joint in enumerate(PART_JOINT):
                ax.annotate(f"{i} {JOINT_NAMES[joint]}", owners[i], (7, 7), fontsize=8, zorder=4,
                            textcoords="offset points")
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
    distance = 1000 * levels["distance"]
    fig.suptitle(f"Coarsening: mean distance of the 48 points from their joint {distance:.0f} mm")
    fig.tight_layout()
    fig.savefig(path, dpi=70)
