import numpy as np
import pytest

from data.samplers import TrainBatchSampler, eval_order


def batches(sampler, epoch=0, start_batch=0):
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_an_epoch_is_a_permutation_without_its_tail():
    sampler = TrainBatchSampler(num_images=23, batch_size=4, seed=5)
    epoch = batches(sampler, epoch=2)
    assert len(epoch) == len(sampler) == 5
    assert all(len(batch) == 4 and all(number == 2 for number, _ in batch) for batch in epoch)
    indices = [index for batch in epoch for _, index in batch]
    assert len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert all(type(index) is int for index in indices)


def test_the_order_depends_on_seed_and_epoch_only():
    orders = {(seed, epoch): batches(TrainBatchSampler(64, 8, seed), epoch) for seed in (0, 1) for epoch in (0, 1)}
    for key, order in orders.items():
        np.random.seed(3)
        assert batches(TrainBatchSampler(64, 8, key[0]), key[1]) == order
    indices = {str([[index for _, index in batch] for batch in order]) for order in orders.values()}
    assert len(indices) == 4


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_the_global_batches_do_not_depend_on_the_split_over_ranks(world_size, batch_size):
    reference = batches(TrainBatchSampler(100, 12, seed=7), epoch=3)
    ranks = [batches(TrainBatchSampler(100, batch_size, 7, rank, world_size), 3) for rank in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == reference


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_start_batch_gives_the_tail_of_the_epoch(start, sharded):
    sampler = TrainBatchSampler(60, 4, 0, rank=1, world_size=2, sharded=sharded)
    assert len(sampler) == 7
    assert batches(sampler, 5, start) == batches(sampler, 5)[start:]
    assert len(sampler) == 7


def test_sharded_ranks_stay_in_their_shards_and_have_equal_lengths():
    samplers = [TrainBatchSampler(26, 4, 0, rank, 3, sharded=True) for rank in range(3)]  # shards of 9, 9 and 8
    for rank, sampler in enumerate(samplers):
        epochs = [[index for batch in batches(sampler, epoch) for _, index in batch] for epoch in (0, 1)]
        assert len(sampler) == 2
        for indices in epochs:
            assert len(set(indices)) == 8 and set(indices) <= set(range(rank, 26, 3))
        assert epochs[0] != epochs[1]


def test_the_leftover_of_a_shard_changes_with_the_epoch():
    sampler = TrainBatchSampler(18, 4, 0, rank=0, world_size=2, sharded=True)
    seen = {index for epoch in range(10) for batch in batches(sampler, epoch) for _, index in batch}
    assert seen == set(range(0, 18, 2))


@pytest.mark.parametrize("sharded", [False, True])
def test_less_than_one_batch_is_an_error(sharded):
    with pytest.raises(ValueError, match="has 63 images, fewer than one batch of 16 x 4 .*lower --batch-size"):
        TrainBatchSampler(63, 16, 0, 0, 4, sharded)
    assert len(TrainBatchSampler(64, 16, 0, 0, 4, sharded)) == 1


@pytest.mark.parametrize("start_batch", [-1, 6])
def test_start_batch_out_of_range_is_an_error(start_batch):
    with pytest.raises(ValueError, match=f"start_batch is {start_batch}; an epoch has 5 batches"):
        TrainBatchSampler(20, 4, 0).set_epoch(0, start_batch)


@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_takes_each_image_once(num_images, world_size):
    orders = [list(eval_order(num_images, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(orders, [])) == list(range(num_images))
    assert all(order == list(range(rank, num_images, world_size)) for rank, order in enumerate(orders))


@pytest.mark.parametrize("sharded", [False, True])
def test_balanced_classes_are_drawn_equally_often(sharded):
    labels = [0] * 900 + [1] * 90 + [2] * 10
    sampler = TrainBatchSampler(1000, 50, 0, rank=1, world_size=2, sharded=sharded, labels=labels)
    epochs = [[index for batch in batches(sampler, epoch) for _, index in batch] for epoch in range(4)]
    assert all(len(epoch) == 500 for epoch in epochs) and epochs[0] != epochs[1]
    counts = np.bincount([labels[index] for epoch in epochs for index in epoch])
    assert np.abs(counts / 2000 - 1 / 3).max() < 0.05
    assert not sharded or {index % 2 for index in epochs[0]} == {1}
    assert batches(sampler, 2, 3) == batches(sampler, 2)[3:]
