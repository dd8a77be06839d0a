"""One party: a server or a client, each from what is public and from nobody else's rows.

Everything that starts from the run's seed starts alike wherever it is built, so that clients and server agree on the first
network without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from logging import getLogger
from typing import Any

import torch
from recbole.utils import init_seed
from torch import Tensor, nn

from recbole_fedkd.compat import pickles_refused, recbole_warnings_silenced
from recbole_fedkd.data.dataset import client_dataset
from recbole_fedkd.data.rows import sampler_of, training_loader
from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.errors import InputError, not_distilled
from recbole_fedkd.federated.client import Client, ClientSettings, streams_kept
from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.codec import CodecStack, WireCodecs
from recbole_fedkd.federated.knowledge import KNOWLEDGE, Sizes
from recbole_fedkd.federated.knowledge.prototype import hidden_width
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.stage import Clip, Encoding
from recbole_fedkd.federated.strategy import STRATEGIES, Strategy
from recbole_fedkd.federated.strategy.ensemble_distillation import EnsembleDistillation
from recbole_fedkd.federated.sum_tasks import FactorTask, FloorTask, SumTask, TaughtTask
from recbole_fedkd.federated.task import (
    AttentiveTask,
    MutualTask,
    RecBoleTask,
    Samples,
    Task,
    click_loss,
)
from recbole_fedkd.federated.wire import ServerLink
from recbole_fedkd.model import (
    AttnFedKD,
    GramNetwork,
    TeacherAndStudent,
    building,
    normalise_single_rows,
    with_attention,
)
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.floors import FloorHead
from recbole_fedkd.model.learner import build_optimizer
from recbole_fedkd.model.population import (
    client_network,
    network_builders,
    recbole_shared_part,
    shared_part,
    whole_networks,
)
from recbole_fedkd.model.shared import SharedState, check_patterns, stateful
from recbole_fedkd.privacy.attack import attack_stages
from recbole_fedkd.privacy.clipping import FollowedClip
from recbole_fedkd.privacy.noise import LocalNoise, LocalSettings
from recbole_fedkd.privacy.release import PrivateRelease, check_strategy
from recbole_fedkd.privacy.settings import PrivacySettings


@recbole_warnings_silenced()
@pickles_refused()
def build_server(config: Any, schema: DataSchema) -> Server:
    """The server, with a network of its own from the run's seed.

    Args:
        config: the run's config.
        schema: what is public of the dataset.

    Raises:
        InputError: a strategy that distils, over a model without a click probability to distil; a mean of nothing.
    """
    with _from_the_seed(config, schema):
        networks = _seed_networks(config, schema)
    shared = [_shared(config, schema, network.to(config["device"])) for network in networks]
    check_private(config, networks, shared[0])
    return server_of(config, server_strategy(config, schema, networks[0]), shared[0], schema)


def build_client(config: Any, schema: DataSchema, rows: ClientRows, number: int) -> Client:
    """A client, of its own rows and what is public.

    Args:
        config: the run's config.
        schema: what is public of the dataset.
        rows: what the client holds.
        number: of the client, from 0.
    """
    return build_clients(config, schema, {number: rows})[0]


@recbole_warnings_silenced()
@pickles_refused()
def build_clients(config: Any, schema: DataSchema, parts: Mapping[int, ClientRows]) -> list[Client]:
    """Several clients in one place, by their numbers; arguments as of :func:`build_client`."""
    with _from_the_seed(config, schema):
        networks = client_networks(config, schema, parts)
    device = config["device"]
    built = zip(parts.items(), networks, strict=True)
    return [client_of(config, schema, rows, number, network.to(device)) for (number, rows), network in built]


def client_of(config: Any, schema: DataSchema, rows: ClientRows, number: int, network: nn.Module) -> Client:
    """A client with a network that it has already; arguments as of :func:`build_client`."""
    task = build_task(config, schema, rows, network)
    return Client(
        number,
        task,
        partial(build_optimizer, config, name=f"client {number}"),
        build_strategy(config, schema, network),
        client_settings(config, schema.clients),
        config["device"],
        wire_of(config, schema.clients),
    )


@contextmanager
def _from_the_seed(config: Any, schema: DataSchema) -> Iterator[None]:
    """Random streams at the run's seed; the process gets its own back, but where a lone client goes on with the run's."""
    seed = config["seed"] + config["local_rank"]
    if schema.clients == 1:
        init_seed(seed, config["reproducibility"])
        yield
        return
    with streams_kept(config["device"]):
        init_seed(seed, config["reproducibility"])
        yield


def federated_class(config: Any) -> type:
    """The class of a config's model, with attention where that is asked for."""
    kind: type = config.model_class
    return with_attention(kind) if config["attention"] and not config.attentive else kind


def recbole_network(config: Any, schema: DataSchema, rows: ClientRows) -> nn.Module:
    """A RecBole model, built by its own constructor on what one client holds."""
    network: nn.Module = federated_class(config)(config, client_dataset(config, schema, rows))
    normalise_single_rows(network)
    return network


def _seed_networks(config: Any, schema: DataSchema) -> Sequence[nn.Module]:
    """What every client starts from, one network per architecture, without a row of anybody's."""
    if config.attentive:
        return whole_networks(config, schema, schema.everybody())
    with building(config):
        return [recbole_network(config, schema, schema.everybody())]


def client_networks(config: Any, schema: DataSchema, parts: Mapping[int, ClientRows]) -> list[nn.Module]:
    """Networks of clients, by their numbers; called where the random streams are at the run's seed."""
    networks: list[nn.Module] = []
    if config.attentive:
        builders, wholes = network_builders(config, schema), whole_networks(config, schema, schema.everybody())
        for number, rows in parts.items():
            architecture = number % len(builders)
            networks.append(client_network(builders[architecture], schema, rows, wholes[architecture]))
        return networks
    with building(config):
        *others, last = parts.values()
        for rows in others:
            with streams_kept(config["device"]):
                networks.append(recbole_network(config, schema, rows))
        return [*networks, recbole_network(config, schema, last)]


def _shared(config: Any, schema: DataSchema, network: nn.Module) -> SharedState:
    """What of a network a strategy may send."""
    patterns = config["private_parameters"]
    return shared_part(network, patterns) if config.attentive else recbole_shared_part(network, patterns, schema)


def build_task(config: Any, schema: DataSchema, rows: ClientRows, network: nn.Module) -> Task:
    """What a client trains: its network on its own rows."""
    shared = _shared(config, schema, network)
    if not config.attentive:
        return recbole_task(config, network, shared, client_dataset(config, schema, rows))
    batch_size, reg_weight, seed = config["train_batch_size"], config["reg_weight"], config["seed"]
    if isinstance(network, GramNetwork):
        return SumTask(network, shared)
    if isinstance(network, FactorHead):
        kind_of_head = FloorTask if isinstance(network, FloorHead) else FactorTask
        return kind_of_head(network, shared, batch_size, reg_weight, seed)
    kind = MutualTask if isinstance(network, TeacherAndStudent) else AttentiveTask
    samples = samples_of(schema, rows, schema.own_numbers(rows), config["device"])
    labels, negatives = len(schema.label_values), negatives_per_row(config)
    arguments = (network, shared, samples, labels, batch_size, reg_weight, negatives, schema.item_num, seed)
    if config.taught_by_fold_in:
        return TaughtTask(*arguments, weight=config["fold_in_weight"], unrated=config["unrated_pairs"])
    return kind(*arguments)


def samples_of(schema: DataSchema, rows: ClientRows, users: Tensor, device: torch.device) -> Samples:
    """Training rows as labelled samples of users by their local numbers ``[n]``."""
    context = {name: values.to(device) for name, values in schema.context_of(rows).items()}
    items, labels = rows.interactions[schema.item_field], schema.label_indices(rows)
    return Samples(users.to(device), items.to(device), labels.to(device), context)


def negatives_per_row(config: Any) -> int:
    """Sampled negatives per training row."""
    return int(config["train_neg_sample_args"]["sample_num"]) if config["label_mode"] == "implicit" else 0


def recbole_task(config: Any, network: nn.Module, shared: SharedState, dataset: Any) -> RecBoleTask:
    """A RecBole model on one client's part of the training split."""
    rows, item_field = len(dataset.inter_feat), config["ITEM_ID_FIELD"]
    build_loader = partial(_training_loader, config, dataset)
    return RecBoleTask(network, shared, build_loader, rows, item_field, config["device"], config["seed"])


def _training_loader(config: Any, dataset: Any, shuffle: bool) -> Any:
    """RecBole's loader of one client's rows, of which its own users' items alone are no negatives."""
    sampling = config["train_neg_sample_args"]
    sampler = None
    if sampling["distribution"] != "none":
        drawn = sampling["distribution"], sampling["alpha"]
        sampler = sampler_of(config, ["train"], dataset, [dataset], *drawn).set_phase("train")
    return training_loader(config)(config, dataset, sampler, shuffle=shuffle)


def build_strategy(config: Any, schema: DataSchema, network: nn.Module) -> Strategy:
    """The config's strategy over a network.

    Raises:
        InputError: it distils what the network does not say, or averages what there is not.
    """
    kind = STRATEGIES[config["strategy"]]
    of_sums = hasattr(config.model_class, "sums")
    if not of_sums and not any(name != "dummy_param" for name, _ in network.named_parameters()):
        raise InputError(
            f"model '{config['model']}' learns nothing by gradient, so there is nothing for clients to train"
        )
    _check_distillable(config, config.attentive or click_loss(network) is not None)
    if kind.shares_parameters and config["row_mean"] == "changed" and wire_of(config, schema.clients).changes_uploads:
        raise InputError(
            "row_mean=changed sees which rows a client left as they were, which codecs and stages blur; unset one of them"
        )
    if kind.shares_parameters and config["row_mean"] == "changed" and config["robust_mean"] is not None:
        raise InputError(
            f"row_mean=changed is a mean, and robust_mean={config['robust_mean']} takes its place; unset one of them"
        )
    labels = len(schema.label_values) if config.attentive else RecBoleTask.labels
    everybody = config["clients_per_round"] is None and config["min_clients"] is None
    return kind.of(
        config,
        Sizes(
            schema.clients, labels, schema.item_num, everybody, hidden_width(network), user_unit(config), config["seed"]
        ),
    )


def server_strategy(config: Any, schema: DataSchema, network: nn.Module) -> Strategy:
    """The strategy as the server has it: with pairs of its own, where it trains on such. Raises as :func:`build_strategy`."""
    strategy = build_strategy(config, schema, network)
    if isinstance(strategy, EnsembleDistillation):
        rows_each, seed = max(1, config["history_length"]), config["seed"]
        users = min(_INVENTED_USERS, strategy.settings.unlabelled_pairs)
        history = schema.invented(users, rows_each, seed)
        with _from_the_seed(config, schema):
            (builder,) = network_builders(config, schema)
            own = builder.build(history).to(config["device"]).double().eval()
        # As many pairs of the same users; what is drawn for them is not their history.
        pairs = schema.invented(users, -(-strategy.settings.unlabelled_pairs // users), seed + 1)
        samples = samples_of(schema, pairs, schema.own_numbers(pairs), config["device"])
        context = {
            name: value.double() if value.is_floating_point() else value for name, value in samples.context.items()
        }
        samples = replace(samples, context=context)
        labels, batch_size = len(schema.label_values), config["train_batch_size"]
        strategy.unlabelled = AttentiveTask(
            own, shared_part(own, []), samples, labels, batch_size, 0.0, 0, schema.item_num, seed
        )
    return strategy


_INVENTED_USERS = 256


def _check_distillable(config: Any, has_logits: bool) -> None:
    if not STRATEGIES[config["strategy"]].exchanges_knowledge:
        return
    if not has_logits:
        raise InputError(not_distilled(config["strategy"], config["model"]))
    if KNOWLEDGE[config["knowledge"]].reads_hidden:
        if not issubclass(config.model_class, AttnFedKD):
            raise InputError(
                f"knowledge={config['knowledge']} exchanges hidden states, which model '{config['model']}' does not tell; use "
                "--model=AttnFedKD for it"
            )
        widths = {
            list(student.get("hidden_sizes", config["hidden_sizes"]))[-1] for student in config["student_pool"] or [{}]
        }
        if len(widths) > 1:
            raise InputError(
                f"knowledge={config['knowledge']} compares hidden states, which student_pool makes of widths "
                f"{', '.join(map(str, sorted(widths)))}; give every student's hidden_sizes the same last number"
            )
    uses_prior = config["knowledge"] == "item" and config["knowledge_use"] != "distil"
    if uses_prior and not issubclass(config.model_class, AttnFedKD):
        raise InputError(
            f"knowledge_use is '{config['knowledge_use']}', but only AttnFedKD adds a log-prior to its logits; model "
            f"'{config['model']}' takes knowledge_use=distil"
        )


def check_private(config: Any, networks: Sequence[nn.Module], shared: SharedState) -> None:
    """Raise :class:`InputError` for a private pattern that fits nothing, and for a mean that has nothing left."""
    names = [name for network in networks for name in stateful(network)]
    check_patterns("private_parameters", config["private_parameters"], names)
    if STRATEGIES[config["strategy"]].shares_parameters and not shared.parameters():
        raise InputError("private_parameters leaves nothing that could be averaged; use strategy=local")


def client_settings(config: Any, clients: int) -> ClientSettings:
    """The client's keys of the config, in a federation of so many."""
    return ClientSettings(
        local_epochs=config["local_epochs"],
        clean_pass=config["knowledge_pass"] == "clean",
        reset_optimizer=config["reset_optimizer"],
        # A lone client draws from the run's streams: a federation of one is RecBole's own training.
        seed=config["seed"] if clients > 1 else None,
        clip_grad_norm=config["clip_grad_norm"],
        error_feedback=config["error_feedback"],
        enable_amp=config["enable_amp"],
        serve_average=config["serve_average"],
    )


def server_of(config: Any, strategy: Strategy, shared: SharedState, schema: DataSchema) -> Server:
    """The server of a strategy over a schema's clients, which starts with a network of the run's seed."""
    privacy, clients = PrivacySettings.of(config), schema.clients
    if privacy is not None and (warning := privacy.weak(clients, schema.user_num - 1)) is not None:
        getLogger().warning(warning)
    release = PrivateRelease(privacy, config["clients_per_round"]) if privacy is not None else None
    hides = None
    if config["secure_aggregation"]:
        from recbole_fedkd.privacy.identity import new_identities  # both need an extra
        from recbole_fedkd.privacy.secure_sum import SecureSum, check_secure

        noisy = release if release is not None and release.settings.noise == "distributed" else None
        here = cache(partial(new_identities, range(clients)))
        hides = partial(SecureSum, least=config["min_clients"] or 0, release=noisy, identities=here)
    server = Server(strategy, config["seed"], config["clients_per_round"], wire_of(config, clients), release, hides)
    server.start(shared)
    bound, sent = privacy.bound if privacy is not None else clip_of(server.codecs), strategy.upload_schema(server.state)
    if bound is not None and sent is not None and (warning := bound.empties(sent)) is not None:
        getLogger().warning(warning)
    if hides is not None:
        server.link.stages = [
            stage for stage in server.link.stages if not isinstance(stage, Clip)
        ]  # it sees none of them
        clip = clip_of(server.codecs)
        check_secure(strategy, server.state)
        if config["codecs"]:
            assert clip is not None
            server.hides = partial(hides, grid=partial(_grid, config, clip, server.link))
    if release is not None:
        check_strategy(strategy, server.state, config["clients_per_round"] is not None, release.settings)
        release.follows = next((stage for stage in server.link.stages if isinstance(stage, FollowedClip)), None)
    return server


def _grid(config: Any, clip: ClipSettings, link: ServerLink, samples: Mapping[int, int]) -> Any:
    """The grid of a round under masks, at the server's end of the wire."""
    from recbole_fedkd.privacy.secure_sum import Grid

    assert link.broadcast is not None  # stage clip has networks travel as what changed of them
    return Grid.of(config, clip, link.reference, link.broadcast.version, samples)


def clip_of(codecs: WireCodecs) -> ClipSettings | None:
    """The bound that stage ``clip`` sets; None where there is none."""
    return next((settings for name, settings in codecs.stages if name == Clip.name), None)


def user_unit(config: Any) -> Callable[[str], float] | None:
    """Bounds of single users by the names of arrays, where ``privacy`` is theirs and a client may hold many; else None."""
    privacy = PrivacySettings.of(config)
    return privacy.bound.norm_of if privacy is not None and privacy.bounds_users(config) else None


def _bound(privacy: PrivacySettings) -> tuple[Any, Any]:
    """The stage that shortens a message, and with local noise hides what it says."""
    bound = privacy.bound
    if privacy.clip_quantile is not None:
        return FollowedClip, bound
    if privacy.noise != "local" or privacy.noise_multiplier is None:
        return Clip.name, bound
    return LocalNoise, LocalSettings(bound.clip_norm, bound.norms, privacy.noise_multiplier)


def wire_of(config: Any, clients: int) -> WireCodecs:
    """What both ends of the wire know, in a federation of so many.

    Under ``privacy`` every message is clipped before anything else happens to it; a wrong client changes its own behind
    whatever bounds it.
    """
    wire, privacy = WireCodecs.of(config), PrivacySettings.of(config)
    if config["secure_aggregation"]:
        wire = replace(wire, up=CodecStack())  # whoever masks rounds by a scale that is public
    stages = wire.stages
    if privacy is not None and user_unit(config) is None:
        stages = (_bound(privacy), *stages)
    behind = next((number for number, (name, _) in enumerate(stages) if name == Encoding.name), len(stages))
    return replace(wire, stages=(*stages[:behind], *attack_stages(config, clients), *stages[behind:]))
