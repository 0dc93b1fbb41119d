"""TRA's memory of past errors, which never uses errors that are not known yet."""

from __future__ import annotations

import pytest
import torch
from test_own_steps import METHODS, fit_method_model, make_method_model
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.methods.tra import ErrorMemory, TRAModule
from qtorch.nn.temporal.tra import TRA, minmax, sinkhorn

LOOKBACK, HORIZON = 4, 2


@pytest.fixture
def network() -> TRA:
    torch.manual_seed(0)
    return TRA(d_feat=4, hidden_size=8, num_layers=1, lookback=LOOKBACK, label_horizon=HORIZON)


def past_samples_loader(dataset: ToyDataset):
    return lambda dates: dataset.samples(dates, data_key="learn")


def test_memory_has_the_errors_of_days_with_known_labels(dataset: ToyDataset, network: TRA) -> None:
    samples = TRAModule.prepare_prediction(
        network, dataset.samples("test"), past_samples_loader(dataset)
    )
    all_samples = dataset.samples(slice(None), data_key="learn")
    rows = {
        (d, i): k
        for k, (d, i) in enumerate(
            zip(all_samples.date.tolist(), all_samples.instrument.tolist(), strict=True)
        )
    }
    for number in (0, 40, len(samples) - 1):
        date, instrument = int(samples.date[number]), int(samples.instrument[number])
        errors = samples.batch(torch.tensor([number])).extra["errors"][0]
        assert errors.shape == (LOOKBACK, 3)
        for step in range(LOOKBACK):
            day = date - HORIZON - LOOKBACK + 1 + step
            expected = torch.zeros(3)
            if (day, instrument) in rows:
                batch = all_samples.batch(torch.tensor([rows[day, instrument]]))
                with torch.no_grad():
                    prediction = network.predictions(network.model(batch.x))[0, :, 0]
                expected = minmax((prediction - batch.y[0, 0]).square())
            torch.testing.assert_close(errors[step], expected)


def test_unknown_labels_do_not_change_scores(network: TRA) -> None:
    first, second = ToyDataset(), ToyDataset()
    model = fit_method_model(first, "TRA", epochs=1, **METHODS["TRA"])
    days = first.view.calendar
    prediction_date = days[50]
    first_unknown = days.get_indexer([prediction_date])[0] - HORIZON + 1
    label = second.view.groups["label"].column("LABEL")
    # A view: this changes the dataset's labels from here on.
    label[first_unknown:] = -3 * label[first_unknown:]
    before, after = (model.predict(d, slice(days[48], days[-1])) for d in (first, second))
    dates = before.index.get_level_values("datetime")
    assert before[dates <= prediction_date].equals(after[dates <= prediction_date])
    prepared_samples = [
        TRAModule.prepare_prediction(network, d.samples("test"), past_samples_loader(d))
        for d in (first, second)
    ]
    first_memory, second_memory = (samples.extras["errors"] for samples in prepared_samples)
    assert not torch.equal(first_memory.values, second_memory.values)


def test_predictions_do_not_depend_on_batch_size(dataset: ToyDataset) -> None:
    model = fit_method_model(dataset, "TRA", epochs=1, **METHODS["TRA"])
    whole = model.predict(dataset)
    model.batch["eval_size"] = 7
    torch.testing.assert_close(
        torch.tensor(model.predict(dataset).values), torch.tensor(whole.values)
    )


def test_router_is_not_trained_while_the_transport_plan_routes(dataset: ToyDataset) -> None:
    networks = []
    for pretrain in (1, 0):
        model = fit_method_model(
            dataset,
            "TRA",
            epochs=1,
            network=METHODS["TRA"]["network"],
            module={"pretrain": pretrain, "rho": 0.5},
        )
        networks.append(model.network_)
    torch.manual_seed(3)
    initial_network = TRA(d_feat=4, hidden_size=8, num_layers=1, router_size=4)
    assert torch.equal(networks[0].fc.weight, initial_network.fc.weight)
    assert not torch.equal(networks[0].predictors.weight, initial_network.predictors.weight)
    assert not torch.equal(networks[1].fc.weight, initial_network.fc.weight)


def test_valid_loss_matches_the_prediction(dataset: ToyDataset) -> None:
    model = fit_method_model(dataset, "TRA", epochs=1, **METHODS["TRA"])
    samples = dataset.samples("valid", data_key="learn")
    scores = torch.tensor(model.predict(dataset, "valid").values)
    expected = (scores - samples.target[:, 0]).square().mean()
    assert model.evals_result_["valid"]["loss"][0] == pytest.approx(float(expected), rel=1e-5)


def test_day_batch_writes_no_padding_to_the_memory(dataset: ToyDataset, network: TRA) -> None:
    samples = dataset.samples("train", data_key="learn")
    memory = ErrorMemory(network, samples)
    batch = next(BatchLoader(samples, order="day", days_per_batch=3).batches(0)).flatten()
    memory.write(batch.date, batch.instrument, torch.ones(len(batch.date), 3), batch.mask)
    assert int(memory.values[:-1].sum()) == 3 * int(batch.mask.sum())
    assert not memory.values[-1].any()


def test_transport_plan_balances_the_predictors() -> None:
    cost = minmax(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)))
    is_sample = torch.arange(200) != 7
    plan = sinkhorn(cost, is_sample, num_iters=50)
    torch.testing.assert_close(plan.sum(1), is_sample.float())
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 199 / 3), rtol=1e-3, atol=0)
    best = plan[is_sample].argmax(1) == cost[is_sample].argmin(1)
    assert best.float().mean() > 0.9
    assert torch.equal(minmax(torch.full((2, 3), 5.0)), torch.ones(2, 3))


def test_too_short_label_horizon_raises(dataset: ToyDataset) -> None:
    train = dataset.samples("train", data_key="learn")
    train.horizon = 3

    class LongHorizonDataset(ToyDataset):
        def samples(self, segment, **options):
            segment_samples = super().samples(segment, **options)
            segment_samples.horizon = 3
            return segment_samples

    with pytest.raises(ConfigError, match="label_horizon of TRA is 2"):
        make_method_model("TRA", network={"label_horizon": 2}).fit(LongHorizonDataset())
    model = fit_method_model(LongHorizonDataset(), "TRA", epochs=1, **METHODS["TRA"])
    assert model.network_.label_horizon == 3
    live_network = TRA(d_feat=4, hidden_size=8, num_layers=1)
    model = make_method_model("TRA")
    model.network = live_network
    with pytest.raises(ConfigError, match="look 3 days ahead"):
        model.fit(LongHorizonDataset())
