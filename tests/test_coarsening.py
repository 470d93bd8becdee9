"""sources/coarsening.py on the capsule body of conftest.py."""

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipart import PART_JOINT
from sources.coarsening import (
    assign_parts,
    coarsen,
    contract,
    level_matrix,
    match_pass,
    mesh_edges,
    vertex_areas,
)


@pytest.mark.parametrize("weighting", ["joint", "plain"])
def test_coarsening_is_exact_nested_complete_and_connected(bodies, weighting):
    vertices, faces = bodies["vertices"][0], bodies["faces"]
    extra = np.array([[9.0, 9, 9], [9, 9, 8], [9, 8, 8]])  # a loose triangle, as Anny's eyes are
    faces = np.concatenate([faces, [len(vertices) + np.arange(3)]])
    vertices = np.concatenate([vertices, extra])
    joints = bodies["joints"][0][list(PART_JOINT)]
    levels = coarsen(vertices, faces, joints, weighting=weighting, tries=3)
    graph = nx.Graph(mesh_edges(faces).tolist())
    for size in (192, 96, 48):
        label = levels[size]
        assert (label[-3:] == -1).all() and (label[:-3] >= 0).all()
        assert set(label[:-3]) == set(range(size))
        for k in range(size):
            assert nx.is_connected(graph.subgraph(np.flatnonzero(label == k).tolist()))
        matrix = level_matrix(label, np.ones(len(label)))
        assert np.allclose(matrix.sum(1), 1) and ((matrix > 0).sum(0)[:-3] == 1).all()
        assert np.allclose(matrix[5] @ vertices, vertices[label == 5].mean(0))
    assert np.array_equal(levels[96][:-3] // 2, levels[48][:-3])  # fine rows 2k, 2k + 1: dense k
    for k in range(192):
        assert len(set(levels[96][levels[192] == k])) == 1


def test_joint_weighting_ties_points_to_nearby_joints(bodies, levels):
    joints = bodies["joints"][0][list(PART_JOINT)]
    matrix = level_matrix(levels[48], vertex_areas(bodies["vertices"][0], bodies["faces"]))
    points = matrix @ bodies["vertices"][0]
    distance = np.linalg.norm(points[:, None] - joints, axis=-1)
    own = distance[np.arange(48), np.arange(48) // 3]
    assert own.mean() == pytest.approx(levels["distance"])
    best = assign_parts(distance)  # rows 3i, 3i + 1, 3i + 2 belong to part i already
    assert distance[np.arange(48), best].sum() == pytest.approx(own.sum())


def test_match_pass_takes_the_heaviest_normalised_edge_and_stops_on_target():
    edges, weight, ones = np.array([[0, 1], [1, 2], [2, 3]]), np.array([1.0, 5.0, 1.0]), np.ones(4)

    def labels(mass, order, target, cap=np.inf):
        return match_pass(edges, weight, mass, order, target, cap).tolist()

    assert labels(ones, [1, 0, 2, 3], 2) == [0, 1, 1, 2]  # 0 and 3 stay alone
    assert labels(ones, [0, 3, 1, 2], 2) == [0, 0, 1, 1]
    assert max(labels(ones, [0, 3, 1, 2], 3)) == 2
    assert labels(ones, [0, 1, 2, 3], 2, 1.5) == [0, 1, 2, 3]  # too heavy together
    light_end = np.array([0.1, 1.0, 1.0, 1.0])  # 1 * (1 / 0.1 + 1) beats 5 * (1 + 1)
    assert labels(light_end, [1, 2, 3, 0], 2) == [0, 0, 1, 1]


def test_contract_adds_parallel_edges_and_drops_loops():
    edges = np.array([[0, 1], [0, 2], [1, 3], [2, 3]])
    edges, weight = contract(edges, np.ones(4), np.array([0, 0, 1, 1]))
    assert edges.tolist() == [[0, 1]] and weight.tolist() == [2.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(2, 1), (3, 3), (4, 2), (6, 2), (6, 3)]))
def test_assignment_is_optimal_against_brute_force(seed, shape):
    n, m = shape
    cost = np.random.default_rng(seed).random(shape)
    owner = assign_parts(cost)
    assert np.bincount(owner, minlength=m).tolist() == [n // m] * m
    every = set(itertools.permutations(np.arange(m).repeat(n // m)))
    best = min(cost[range(n), o].sum() for o in every)
    assert cost[range(n), owner].sum() == pytest.approx(best)


def test_coarsening_refuses_what_it_cannot_do(bodies):
    vertices, faces = bodies["vertices"][0], bodies["faces"]
    joints = bodies["joints"][0][list(PART_JOINT)]
    with pytest.raises(ValueError, match="weighting must be"):
        coarsen(vertices, faces, joints, weighting="area")
    with pytest.raises(ValueError, match="half the one before"):
        coarsen(vertices, faces, joints, sizes=(192, 96, 40))
    with pytest.raises(ValueError, match="too few for 192 clusters"):
        coarsen(vertices, faces[:50], joints)
    with pytest.raises(ValueError, match="cannot be shared equally"):
        assign_parts(np.ones((5, 2)))
