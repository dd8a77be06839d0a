"""What each command does; what it needs is loaded when it runs. It returns an exit code where that may be another than 0."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from recbole_fedkd.command_line.arguments import parse_after_first, parse_arguments, take_count, take_run
from recbole_fedkd.command_line.completion import SHELLS, completion_script
from recbole_fedkd.command_line.early import (
    check_cells,
    check_federation,
    check_manifest,
    check_manifest_of_items,
    check_run,
    check_search,
)
from recbole_fedkd.command_line.help import presets_text
from recbole_fedkd.command_line.tables import commas_told, listed_tokens, rated_tokens, writable_table, write_table
from recbole_fedkd.config.given import read_given, values_of_preset
from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.files import check_checkpoint
from recbole_fedkd.network import network_of


def run(keys: dict[str, str]) -> int:
    """One run, or with ``--experiment`` many."""
    if "experiment" in keys:
        return _compare(keys.pop("experiment"), keys)
    model, dataset, files = take_run(keys)
    quiet, verbose = (keys.pop(name, "False") == "True" for name in ("quiet", "verbose"))
    if quiet and verbose:
        raise InputError("--quiet and --verbose are both given; one run cannot be both")
    check_run(model, dataset, files, keys)
    given = read_given(files, None, keys)
    if verbose and "show_progress" not in given:
        keys["show_progress"] = "True"
    from recbole_fedkd.compat import keep_freed_memory
    from recbole_fedkd.logs import screen
    from recbole_fedkd.quick_start import run_recbole_fedkd
    from recbole_fedkd.telling import table

    keep_freed_memory()
    silent = quiet or str(given.get("state")).upper() in ("ERROR", "CRITICAL")
    level = logging.INFO if verbose else logging.ERROR if silent else logging.WARNING
    with screen(level):
        tell = None if quiet or verbose else partial(print, flush=True)
        result = run_recbole_fedkd(model, dataset, files, command_line=keys, tell=tell)
    if quiet:
        print(table(result), flush=True)
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Run the cells of an experiment and report on them."""
    keys = parse_after_first(
        arguments, "compare needs an experiment; write compare <experiment>.yaml [--key=value ...]"
    )
    return _compare(arguments[0], keys)


def _compare(file: str, keys: dict[str, str]) -> int:
    """Run an experiment and make its report; the exit code is 1 if a run failed."""
    out = Path(keys.pop("out", f"results/{Path(file).stem}"))
    workers = take_count(keys, "workers", most=1024) or os.cpu_count() or 1
    network, keep = network_of(keys), keys.pop("keep_checkpoints", "False")
    if keep not in ("True", "False"):
        raise InputError(f"keep_checkpoints is '{keep[:40]}'; it must be True or False")
    from recbole_fedkd.experiment.grid import read_experiment
    from recbole_fedkd.report import write_report

    experiment = read_experiment(file, keys)
    check_cells(experiment.cells)
    from recbole_fedkd.experiment.runner import run_experiment

    with _kept_in(out):
        outcome = run_experiment(experiment, out, workers, keep=keep == "True")
    print(outcome)
    print(f"report: {write_report(out, network)}")
    return 1 if outcome.failed else 0


@contextmanager
def _kept_in(out: Path) -> Iterator[None]:
    """Whoever stops many runs reads where those lie that are done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"the same command goes on where it stopped; what is done is kept in '{out}'")
        raise


def report(arguments: Sequence[str]) -> None:
    """Make the report of an experiment again, or the page of a run."""
    keys = parse_after_first(arguments, "report needs the folder of one experiment or run; write report <folder>")
    network = network_of(keys)
    if keys:
        raise InputError(f"report takes no --{next(iter(keys))}; see report --help")
    if not Path(arguments[0]).is_dir():
        raise InputError(f"folder '{arguments[0]}' does not exist; report needs the folder of an experiment or a run")
    from recbole_fedkd.report import check_has_records, write_report

    check_has_records(Path(arguments[0]))
    print(f"report: {write_report(Path(arguments[0]), network)}")


def audit(arguments: Sequence[str]) -> None:
    """Tell what the server of a run could of its clients."""
    keys = parse_after_first(
        arguments, "audit needs the folder of one run, or a checkpoint; write audit <run> [--rounds=N] [--clients=N]"
    )
    rounds, most = take_count(keys, "rounds", most=1000), take_count(keys, "clients", most=10_000)
    from recbole_fedkd.machines.folders import SERVER_STATE

    if (Path(arguments[0]) / SERVER_STATE).is_file():
        raise InputError(
            f"folder '{arguments[0]}' is a coordinator's, whose rows are with its parties; audit a run of the same keys in one "
            "process (engine=local)"
        )
    check_checkpoint(arguments[0])
    from recbole_fedkd.auditing import MOST_CLIENTS, audited_run, write_audit
    from recbole_fedkd.logs import screen
    from recbole_fedkd.report.audit_page import verdict

    with screen(logging.ERROR):
        audited = audited_run(arguments[0], rounds, most or MOST_CLIENTS, **keys)
        page = write_audit(audited, Path(arguments[0]))
    for message in audited.seen:
        guess = "nothing to guess" if message.membership is None else f"membership AUC {message.membership:.3f}"
        line = f"round {message.round}  {message.kind}{', masked' if message.masked else ''}  {guess} ({message.pairs:,} pairs)"
        ratings = "" if message.ratings is None else f"  exact ratings {100 * message.ratings:.0f} %"
        print(f"{line}  exact sets {100 * message.exact:.0f} %{ratings}", flush=True)
    if rounds is not None and len(audited.seen) < rounds:
        over = (
            "clients send nothing after them" if audited.canaries is None else "the budget of privacy lasts for no more"
        )
        print(f"--rounds={rounds}: looked at {len(audited.seen)}; {over}")
    print("\n".join(verdict(asdict(audited))))
    if audited.canaries is not None:
        print(
            f"epsilon  at least {audited.canaries.epsilon:.3f} by canaries, at most {audited.canaries.accounted:.3f} accounted"
        )
    print(f"page: {page}")


def search(arguments: Sequence[str]) -> None:
    """Search for hyper-parameters."""
    keys = parse_arguments(arguments)
    if "model" not in keys and (of_preset := values_of_preset(keys).get("model")):
        keys["model"] = of_preset
    for name in ("params_file", "model", "dataset"):
        if name not in keys:
            raise InputError(f"search needs --{name}=<{name}>; see search --help")
    out = Path(keys.pop("out", f"results/search-{keys['model']}-{keys['dataset']}.json"))
    trials = take_count(keys, "trials")
    file, files = keys.pop("params_file"), keys.pop("config_files", "").split()
    algorithm = keys.pop("algorithm", "tpe")
    from recbole_fedkd.search.parameters import check_searchable, read_parameters

    parameters = read_parameters(file)
    check_searchable(parameters, keys, algorithm)
    check_search(parameters, files, keys)
    from recbole_fedkd.logs import screen
    from recbole_fedkd.search.trials import Search, config_of, run_search, search_table

    search = Search.prepare(parameters, keys, files, algorithm)
    with screen(logging.WARNING), _kept_in(Path(f"{out}.journal")):
        content = run_search(search, out, trials)
    print(search_table(content))
    print(f"result: {out}")
    print(f"config of the best: {config_of(out)}")


def presets(arguments: Sequence[str]) -> None:
    """List the presets."""
    if arguments:
        raise InputError(f"presets takes no arguments, and '{arguments[0][:100]}' is one")
    print(presets_text(), flush=True)


def completion(arguments: Sequence[str]) -> None:
    """Print a shell's completion."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise InputError(f"completion needs the name of one shell: {', '.join(SHELLS)}")
    print(completion_script(arguments[0]), flush=True)


def recommend(arguments: Sequence[str]) -> None:
    """Recommend from a run."""
    keys = parse_after_first(
        arguments, "recommend needs a run; write recommend <run folder> --users=<user>,<user>", flags=("exclude-seen",)
    )
    k = take_count(keys, "k") or 10
    exclude = keys.pop("exclude-seen", "False") == "True"
    asked = {name: keys.pop(name) for name in ("users", "history", "similar") if name in keys}
    if len(asked) != 1:
        raise InputError("recommend needs one of --users, --history, --similar; see recommend --help")
    ((what, tokens),) = asked.items()
    out = writable_table(keys.pop("out")) if "out" in keys else None
    users = listed_tokens(tokens) if what == "users" else None
    check_checkpoint(arguments[0], best=True)
    from recbole_fedkd.logs import screen
    from recbole_fedkd.recommend import load

    with screen(logging.ERROR):  # what may be thought of the data and how they are judged was said by the run
        recommender = load(arguments[0], keys)
    if what == "similar":
        table = recommender.similar_items(tokens, k)
    else:
        with commas_told(what, tokens):
            if what == "users":
                table = recommender.recommend(users, k, exclude_seen=exclude)
            else:
                table = recommender.recommend_for(rated_tokens(tokens), k)
    if out is None:
        print(table.to_string(index=False), flush=True)
    else:
        write_table(table, out)
        print(f"{len(table)} rows: {out}")


def import_file(arguments: Sequence[str]) -> None:
    """Make a dataset of a table."""
    keys = parse_after_first(
        arguments,
        "import needs a file; write import <file>.csv [--user=<column> --item=<column> ...]",
        flags=("overwrite",),
    )
    from recbole_fedkd.data.roles import FIELDS, ROLES, check_table_file

    file = arguments[0]
    name = keys.pop("name", Path(file.removesuffix(".gz")).stem)
    folder = Path(keys.pop("data_path", "dataset"))
    overwrite = keys.pop("overwrite", "False") == "True"
    encoding, separator = keys.pop("encoding", None), keys.pop("separator", None)
    side = {role: keys.pop(f"{role}s") for role in ("user", "item") if f"{role}s" in keys}
    named = {role: keys.pop(role) for role in ROLES if role in keys}
    if keys:
        known = (*ROLES, "users", "items", "name", "data_path", "encoding", "separator", "overwrite")
        wrong = next(iter(keys))
        raise InputError(f"import does not know --{wrong}{nearest(wrong, known)}; it takes {', '.join(known)}")
    check_table_file(Path(file))
    from recbole_fedkd.data import importing
    from recbole_fedkd.data.side_files import side_table

    table = importing.read_table(file, encoding, separator)
    importing.check_name(name)
    if (folder / name).exists() and not overwrite:
        raise InputError(f"dataset '{folder / name}' is there already; choose another --name, or add --overwrite")
    imported = importing.import_table(table, named, f"'{file}'")
    tables = {}
    for role, path in side.items():
        ids = dict.fromkeys(imported.table[FIELDS[role]])
        frame = importing.read_table(path, encoding, separator)
        tables[role] = side_table(frame, role, imported.columns[role], ids, f"'{path}'")
    target = importing.write_atomic(imported.table, folder, name)
    for role in ("user", "item"):  # of a dataset that is replaced nothing stays
        target.with_suffix(f".{role}").unlink(missing_ok=True)
    targets = [target, *(table.write(folder, name) for table in tables.values())]
    print(imported, *tables.values(), sep="\n")
    preset = "factors --client_num=16" if "rating" in imported.table else "fedmf"
    option = "" if str(folder) == "dataset" else f" --data_path={folder}"
    print(f"written: {', '.join(map(str, targets))}\nnext: recbole-fedkd --preset={preset} --dataset={name}{option}")


def split_federation(arguments: Sequence[str]) -> None:
    """Cut a data set into a folder per party."""
    keys = parse_arguments(arguments)
    out = Path(keys.pop("out", "federation"))
    model, dataset, files = take_run(keys)
    check_federation(model, dataset, files, keys, out)
    from recbole_fedkd.splitting import MANIFEST
    from recbole_fedkd.splitting import split_federation as cut

    folders = cut(model, dataset, out, files, keys)
    print(f"{len(folders)} parties: {folders[0]} ... {folders[-1]}\nmanifest: {out / MANIFEST}")


def manifest(arguments: Sequence[str]) -> None:
    """Make the manifest of a public catalogue."""
    keys = parse_after_first(
        arguments, "manifest needs a catalogue; write manifest <items>.csv --model=<name> --client_num=<parties>"
    )
    out = Path(keys.pop("out", "federation/manifest"))
    users = take_count(keys, "users", most=10**7) or 1000
    model, dataset, files = take_run(keys)
    check_manifest_of_items(Path(arguments[0]), model, dataset, out, files, keys, users)
    from recbole_fedkd.machines.folders import IDENTITY
    from recbole_fedkd.splitting import catalogue_manifest

    schema = catalogue_manifest(Path(arguments[0]), model, dataset, out, files, keys, users)
    first = list(schema.numbers_of_tokens[schema.item_field])[1]
    print(
        f"{schema.item_num - 1} items such as '{first}'; parties: {schema.clients}, of {users} users at most\nmanifest: {out}"
    )
    folder = "<folder>"
    if own := sorted(out.parent.glob(f"party-*/{IDENTITY}")):
        folder = "<its folder>"
        print(f"signing keys: {own[0].parent} ... {own[-1].parent}; hand each party its own folder")
    numbers = f"<0 to {schema.clients - 1}>"
    named = shlex.quote(f"--manifest={out}")
    print(f"next, at each party: recbole-fedkd bring <file> {named} --number={numbers} --out={folder}")


def bring(arguments: Sequence[str]) -> None:
    """Make a party's folder of its own file."""
    keys = parse_after_first(
        arguments, "bring needs a file; write bring <file>.csv --manifest=<folder> --number=<n> --out=<folder>"
    )
    if lacking := [name for name in ("manifest", "number", "out") if name not in keys]:
        raise InputError(f"bring needs --{lacking[0]}=<...>; see bring --help")
    manifest, number, out = Path(keys.pop("manifest")), keys.pop("number"), Path(keys.pop("out"))
    if not number.isdecimal():
        raise InputError(f"number is '{number[:40]}'; it must be a party's number, from 0")
    from recbole_fedkd.data.roles import ROLES, check_table_file
    from recbole_fedkd.machines.folders import IDENTITY, check_free, check_party_brings, keys_of_party

    named = {role: keys.pop(role) for role in ROLES if role in keys}
    check_manifest(
        manifest,
        keys,
        keys_of_party,
        partial(check_party_brings, manifest, int(number)),
        partial(check_free, out, apart_from=IDENTITY),
        partial(check_table_file, Path(arguments[0])),
    )
    from recbole_fedkd.splitting import bring as bring_file

    print(bring_file(Path(arguments[0]), manifest, int(number), out, named, keys))
    command = shlex.join(["recbole-fedkd", "party", str(out), f"--manifest={manifest}"])
    print(f"party: {out}\nnext: {command} --address=<address of the coordinator>")


def coordinate(arguments: Sequence[str]) -> None:
    """Run the server of a federation whose parties are elsewhere."""
    keys = parse_after_first(
        arguments, "coordinate needs a manifest; write coordinate <manifest> --address=<address> --out=<folder>"
    )
    if "address" not in keys or "out" not in keys:
        raise InputError("coordinate needs --address=<address> and --out=<folder>; see coordinate --help")
    address, out = keys.pop("address"), Path(keys.pop("out"))
    from recbole_fedkd.machines.folders import SERVER_STATE, check_apart, keys_of_coordinator
    from recbole_fedkd.machines.trust import Trust

    trust = Trust(*(keys.pop(name, None) for name in ("secret", "certificate", "private-key", "authority")))
    check_manifest(
        Path(arguments[0]),
        keys,
        keys_of_coordinator,
        partial(check_apart, out, own=SERVER_STATE),
        partial(trust.check_coordinator, address),
    )
    from recbole_fedkd.machines.running import RESULT
    from recbole_fedkd.machines.running import coordinate as run_coordinator

    run_coordinator(Path(arguments[0]), address, out, trust, keys)
    print(f"result: {out / RESULT}")


def party(arguments: Sequence[str]) -> None:
    """Run one party of a federation."""
    keys = parse_after_first(
        arguments, "party needs its folder; write party <folder> --manifest=<folder> --address=<address>"
    )
    if "address" not in keys or "manifest" not in keys:
        raise InputError("party needs --manifest=<folder> and --address=<address>; see party --help")
    address, manifest = keys.pop("address"), Path(keys.pop("manifest"))
    from recbole_fedkd.machines.folders import keys_of_party, read_party
    from recbole_fedkd.machines.trust import Trust

    trust = Trust(
        secret=keys.pop("secret", None), authority=keys.pop("authority", None), node_key=keys.pop("node-key", None)
    )
    check_manifest(
        manifest,
        keys,
        keys_of_party,
        partial(read_party, Path(arguments[0])),
        partial(trust.check_party, address),
    )
    from recbole_fedkd.machines.running import live

    live(Path(arguments[0]), manifest, address, trust, keys)


def status(arguments: Sequence[str]) -> None:
    """Say how a federation is."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError("status needs the folder of one coordinator; write status <folder>")
    from recbole_fedkd.machines.journal import status as status_of

    print(status_of(Path(arguments[0])), flush=True)


def cost(arguments: Sequence[str]) -> None:
    """Reckon what a federation costs on a network."""
    run = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    keys = parse_arguments(arguments[1:] if run is not None else arguments)
    from recbole_fedkd.cost import of_run, probe

    network = network_of(keys)
    if run is not None:
        if keys:
            raise InputError(f"cost of a run takes no --{next(iter(keys))}; see cost --help")
        costs = of_run(run)
    else:
        files = keys.pop("config_files", "").split()
        model, dataset = keys.pop("model", None), keys.pop("dataset", None)
        check_federation(model, dataset, files, keys)
        from recbole_fedkd.logs import screen

        with screen(logging.ERROR):
            costs = probe(model, dataset, files, keys)
    print(costs.table(network), flush=True)
