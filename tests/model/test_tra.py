"""What TRA remembers, and that nothing it remembers was not known yet."""

from __future__ import annotations

import pytest
import torch
from test_own_steps import STEPS, own
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.batches import BatchLoader
from qtorch.model.error_memory import ErrorMemory, recalling
from qtorch.nn.tra import TRA, minmax, sinkhorn

LOOKBACK, HORIZON = 4, 2


@pytest.fixture
def network() -> TRA:
    torch.manual_seed(0)
    return TRA(d_feat=4, hidden_size=8, num_layers=1, lookback=LOOKBACK, label_horizon=HORIZON)


def past(dataset: ToyDataset):
    return lambda dates: dataset.samples(dates, data_key="learn")


def test_the_memory_holds_the_errors_of_days_whose_labels_are_known(
    dataset: ToyDataset, network: TRA
) -> None:
    samples = recalling(network, dataset.samples("test"), past(dataset))
    everything = dataset.samples(slice(None), data_key="learn")
    place = {
        (d, i): k
        for k, (d, i) in enumerate(
            zip(everything.date.tolist(), everything.instrument.tolist(), strict=True)
        )
    }
    for number in (0, 40, len(samples) - 1):
        date, who = int(samples.date[number]), int(samples.instrument[number])
        found = samples.batch(torch.tensor([number])).extra["errors"][0]
        assert found.shape == (LOOKBACK, 3)
        for step in range(LOOKBACK):
            day = date - HORIZON - LOOKBACK + 1 + step
            expected = torch.zeros(3)
            if (day, who) in place:
                batch = everything.batch(torch.tensor([place[day, who]]))
                with torch.no_grad():
                    said = network.predicted(network.model(batch.x))[0, :, 0]
                expected = minmax((said - batch.y[0, 0]).square())
            torch.testing.assert_close(found[step], expected)


def test_labels_that_are_not_known_yet_change_no_score(network: TRA) -> None:
    first, second = ToyDataset(), ToyDataset()
    model = own("TRA", trainer={"max_epochs": 1}, **STEPS["TRA"])
    model.fit(first)
    days = first.view.calendar
    turn = days[50]
    known = days.get_indexer([turn])[0] - HORIZON + 1
    label = second.view.groups["label"].column("LABEL")
    label[known:] = -3 * label[known:]  # a view: from here on the labels are others
    before, after = (model.predict(d, slice(days[48], days[-1])) for d in (first, second))
    dates = before.index.get_level_values("datetime")
    assert before[dates <= turn].equals(after[dates <= turn])
    kept = [
        recalling(network, d.samples("test"), past(d)).extras["errors"] for d in (first, second)
    ]
    assert not torch.equal(kept[0].values, kept[1].values)


def test_batches_do_not_matter_to_a_prediction(dataset: ToyDataset) -> None:
    model = own("TRA", trainer={"max_epochs": 1}, **STEPS["TRA"])
    model.fit(dataset)
    whole = model.predict(dataset)
    model.batch["eval_size"] = 7
    torch.testing.assert_close(
        torch.tensor(model.predict(dataset).values), torch.tensor(whole.values)
    )


def test_while_the_transport_routes_the_router_learns_nothing(dataset: ToyDataset) -> None:
    learnt = []
    for pretrain in (1, 0):
        model = own(
            "TRA",
            trainer={"max_epochs": 1},
            network=STEPS["TRA"]["network"],
            module={"pretrain": pretrain, "rho": 0.5},
        )
        model.fit(dataset)
        learnt.append(model.network_)
    torch.manual_seed(3)
    fresh = TRA(d_feat=4, hidden_size=8, num_layers=1, router_size=4)
    assert torch.equal(learnt[0].fc.weight, fresh.fc.weight)
    assert not torch.equal(learnt[0].predictors.weight, fresh.predictors.weight)
    assert not torch.equal(learnt[1].fc.weight, fresh.fc.weight)


def test_the_valid_segment_is_scored_as_it_is_predicted(dataset: ToyDataset) -> None:
    model = own("TRA", trainer={"max_epochs": 1}, **STEPS["TRA"])
    model.fit(dataset)
    samples = dataset.samples("valid", data_key="learn")
    scores = torch.tensor(model.predict(dataset, "valid").values)
    expected = (scores - samples.target[:, 0]).square().mean()
    assert model.evals_result_["valid"]["loss"][0] == pytest.approx(float(expected), rel=1e-5)


def test_a_day_batch_writes_its_own_samples_alone(dataset: ToyDataset, network: TRA) -> None:
    samples = dataset.samples("train", data_key="learn")
    memory = ErrorMemory(network, samples)
    batch = next(BatchLoader(samples, order="day", days_per_batch=3).batches(0)).flat()
    memory.write(batch.date, batch.instrument, torch.ones(len(batch.date), 3), batch.mask)
    assert int(memory.values[:-1].sum()) == 3 * int(batch.mask.sum())
    assert not memory.values[-1].any()


def test_the_transport_shares_the_samples_out() -> None:
    cost = minmax(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))
    there = torch.arange(200) != 7
    plan = sinkhorn(cost, there, num_iters=50)
    torch.testing.assert_close(plan.sum(1), there.float())
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 199 / 3), rtol=1e-3, atol=0)
    best = plan[there].argmax(1) == cost[there].argmin(1)
    assert best.float().mean() > 0.9
    assert torch.equal(minmax(torch.full((2, 3), 5.0)), torch.ones(2, 3))


def test_a_horizon_that_is_too_short_is_refused(dataset: ToyDataset) -> None:
    train = dataset.samples("train", data_key="learn")
    train.horizon = 3

    class Farther(ToyDataset):
        def samples(self, segment, **options):
            found = super().samples(segment, **options)
            found.horizon = 3
            return found

    with pytest.raises(ConfigError, match="label_horizon of TRA is 2"):
        own("TRA", network={"label_horizon": 2}).fit(Farther())
    model = own("TRA", trainer={"max_epochs": 1}, **STEPS["TRA"])
    model.fit(Farther())
    assert model.network_.label_horizon == 3
    live = TRA(d_feat=4, hidden_size=8, num_layers=1)
    model = own("TRA")
    model.network = live
    with pytest.raises(ConfigError, match="look 3 days ahead"):
        model.fit(Farther())
