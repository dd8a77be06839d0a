"""How each command is used, in words."""

USAGE = """\
usage: recbole-fedkd --model=MODEL --dataset=DATASET [--config_files="A.yaml B.yaml"]
                     [--key=value ...]
       recbole-fedkd --resume=RUN [--epochs=N]
       recbole-fedkd COMMAND ...

Trains a model on a dataset and judges it by RecBole's evaluator. In a checkout the same command is
python run_recbole_fedkd.py.

Commands (each has a --help of its own):
  import FILE               make a dataset of a CSV, TSV or parquet file
  compare EXPERIMENT.yaml   run a grid of models, datasets and seeds and make a report of it
  report FOLDER             make that report again from the records alone
  audit RUN                 what the server of a run could tell of its clients
  search                    search for hyper-parameters by validation
  recommend RUN             what a trained model recommends, to its users or to somebody new
  split-federation          cut a data set into a folder per party and a manifest
  manifest ITEMS            make a manifest of a public catalogue, to which ...
  bring FILE                ... a party brings its own rows
  coordinate MANIFEST       the server of a federation whose parties are other processes
  party FOLDER              one party of it
  cost                      bytes and seconds of a federation on links that are not here
  status FOLDER             how it is: round, parties, last seen, bytes, validation curve
  presets                   every preset: its question, its method, what was measured
  completion SHELL          completion of commands, keys and values for bash, zsh or fish

  --model=MODEL           {models}
  --dataset=DATASET       ml-100k comes with RecBole; others lie in --data_path (default: dataset/)
                          or are downloaded
  --config_files=FILES    yaml files, separated by spaces; later ones win, the command line wins
                          over all
  --quiet, --verbose      print the result's table alone; or all that RecBole logs
  --help [WORD]           this text, with the defaults of --model and --preset; what WORD finds,
                          such as attention
  --version               the version

Examples:
  recbole-fedkd --model=AttnFedKD --dataset=ml-100k
  recbole-fedkd --preset=factors --dataset=ml-100k --client_num=16
  recbole-fedkd --model=WideDeep --dataset=ml-100k --metrics="[AUC,MAE,Accuracy,NDCG]"
"""

COMPARE = """\
usage: recbole-fedkd compare EXPERIMENT.yaml [--out=FOLDER] [--workers=N] [--key=value ...]
       python run_recbole_fedkd.py --experiment=EXPERIMENT.yaml [the same]

Runs every cell of an experiment in a process of its own, keeps a record of each, and makes a
report. Runs that are finished are never repeated: the same command goes on after an interruption,
and tries again what failed.

  --out=FOLDER     where records and report go (default: results/<name of the yaml file>)
  --workers=N      runs at a time (default: the number of processors)
  --keep_checkpoints=True   keep the best checkpoint of every run that runs now, in
                            <out>/checkpoints/<run>
  --key=value      a config key that wins in every cell, such as --data_path=... or --epochs=2

The yaml file:

  keys: {epochs: 16, client_num: 4}      # config keys of every cell
  grid:                                  # config key -> list of values; the cells are the product
    dataset: [ml-100k]
    partition: [random, "dirichlet:0.3"]
    label_mode: [threshold, rating]
    seed: [2020, 2021, 2022]             # default: [2020]
  rows:                                  # name in the table -> its keys, which win over all
    local: {preset: local}
    central: {preset: central}
    AFD+CNN: {preset: afd}
    # by: keys that hold for this value of a grid key
    FD+CNN: {preset: fd, by: {label_mode: {threshold: {gamma: 0.3}}}}
    # only: the row exists for these values of the grid
    WideDeep: {model: WideDeep, only: {label_mode: [threshold]}}
  reference: FD+CNN                      # the row that others are tested against; may be left out
  scale:                                 # bytes against quality; each part may be left out
    floor: local                         # the row whose quality is 0 % ...
    ceiling: central                     # ... and the one whose quality is 100 %
    bytes: FD+CNN                        # the row whose bytes are 100 %

Without rows, the values of model, preset and strategy name a row. Without model and preset, the
model is AttnFedKD. A row that sets a key of the grid has that one value on the axis. config_files
(in keys, in a row or on the command line) names config files. published, published_as,
published_for (the values of grid keys that they are about) and published_source hand numbers of a
publication on to the report.
"""

REPORT = """\
usage: recbole-fedkd report FOLDER [NETWORK]

Makes the report of an experiment again, from the records in its folder alone (results/<name>), or
the page of a single run (saved/<run>): learning curve, bytes, clients and the worst of them,
protocols, and how the run goes on. Of an unfinished run its checkpoint is read. Both say how long
the rounds would take on a network (--uplink and so on, see cost --help).
"""

AUDIT = """\
usage: recbole-fedkd audit RUN [--rounds=N] [--clients=N] [--data_path=...]

Runs the first rounds of a run again, with somebody who looks at what the server gets: whether it
can tell which items a client has rated, how many ratings of each kind, and what a release under
differential privacy gives away of canaries. Writes RUN/audit/index.html and audit.json beside it.

  --rounds=N    rounds to look at (default: 2, or those of an exchange in stages); it says so where
                clients send nothing in so many, or a budget of privacy ends before
  --clients=N   clients to look at (default: 60)
"""

SEARCH = """\
usage: recbole-fedkd search --params_file=FILE --model=MODEL --dataset=DATASET [--preset=NAME]
                            [--config_files="A.yaml B.yaml"] [--trials=N] [--out=FILE.json]
                            [--algorithm=tpe|random|exhaustive] [--key=value ...]

Searches for hyper-parameters by the validation score of each trial's best epoch; the test result is
that of the best trial. The same command goes on after an interruption; nothing is tried twice.

  --params_file=FILE   one parameter a line, as RecBole's hyper.test
  --preset=NAME        what is searched around; it names the model where --model does not
  --trials=N           trials in all (default: 10; of an exhaustive search, every combination)
  --algorithm=NAME     tpe (default), random, or exhaustive (choice and quniform only)
  --out=FILE.json      the result (default: results/search-<model>-<dataset>.json), with
                       FILE.json.journal beside it, and FILE.yaml, the best as a config file

Lines of the parameter file:

  backbone choice [cnn,mlp]
  dropout_prob uniform 0,0.5
  learning_rate loguniform -8,-4       # exponents of e
  embedding_size quniform 8,64,8       # multiples of 8
"""

IMPORT = """\
usage: recbole-fedkd import FILE [--user=COLUMN] [--item=COLUMN] [--rating=COLUMN] [--time=COLUMN]
                            [--users=FILE] [--items=FILE] [--name=NAME] [--data_path=dataset]
                            [--overwrite]

Makes a dataset of a CSV, TSV or parquet file with a row per interaction, and tells what it took for
what, and which rows it dropped and why. Columns that are not named are guessed by their names.

  --user, --item     columns of the two ids, taken as texts
  --rating=COLUMN    numbers; --rating= leaves ratings out: then every row is a click
  --time=COLUMN      numbers of any unit, or dates; --time= leaves times out
  --users, --items   files with a row per user or item, whose other columns are features: numbers,
                     texts, or several texts as a|b
  --name=NAME        of the dataset (default: that of the file)
  --data_path=DIR    where datasets lie (default: dataset)
  --separator=MARK   of columns, where it is not found: one character, or tab
  --encoding=NAME    of the text (default: utf-8)
  --overwrite        replace a dataset of that name
"""

RECOMMEND = """\
usage: recbole-fedkd recommend RUN --users=USERS [-k 10] [--exclude-seen] [--out=FILE]
       recbole-fedkd recommend RUN --history=ITEM:RATING,ITEM:RATING [-k 10] [--out=FILE]
       recbole-fedkd recommend RUN --similar=ITEM [-k 10] [--out=FILE]

Prints the best items for users, for somebody who was never there, or most like an item. RUN is a
run folder or a checkpoint file; users and items are the dataset's own.

  --users=USERS      a,b,c; @FILE, one user a line; or all. Quotes keep a comma: '"x, y",z'
  --history=ITEMS    what somebody new rated (items alone where the model learns from clicks)
  --similar=ITEM     an item
  -k N               items per user (default: 10)
  --exclude-seen     leave out what a user has an interaction with
  --out=FILE         write a .csv, .tsv, .json or .parquet file
  --data_path=...    where the data lie now, if they have moved; other config keys work too
"""

PRESETS = """\
usage: recbole-fedkd presets

Lists every preset: the question that it answers, its method, and what was measured of it.
"""

COMPLETION = """\
usage: recbole-fedkd completion bash|zsh|fish

Prints what makes a shell complete commands, keys and the values that keys name. For good:

  recbole-fedkd completion bash >> ~/.bashrc
  recbole-fedkd completion zsh >> ~/.zshrc
  recbole-fedkd completion fish > ~/.config/fish/completions/recbole-fedkd.fish
"""

SPLIT_FEDERATION = """\
usage: recbole-fedkd split-federation --model=MODEL --dataset=DATASET [--out=FOLDER]
                                      [--key=value ...]

Cuts a data set, as a run of the same keys would split and deal it out: FOLDER/manifest holds what
is public, and each FOLDER/party-N the rows of one party alone. Models are those of this package,
metrics those that parties can judge where their rows are (docs/deploy.md lists them).

  --out=FOLDER   a new folder (default: federation)
"""

MANIFEST = """\
usage: recbole-fedkd manifest ITEMS --model=MODEL --client_num=PARTIES [--out=FOLDER]
                              [--users=N] [--dataset=NAME] [--key=value ...]

Makes the manifest of a federation whose parties have files of their own (see bring): the items with
their features, the labels (label_values), and the config, by whose rule a party splits its rows.

  ITEMS            a .item file, or a CSV, TSV or parquet file: an id, and features if there are any
  --out=FOLDER     a new folder (default: federation/manifest)
  --users=N        the most users that one party may have (default: 1000)
  --dataset=NAME   what the data are called (default: the name of the file)
"""

BRING = """\
usage: recbole-fedkd bring FILE --manifest=FOLDER --number=N --out=FOLDER
                           [--user=COLUMN] [--item=COLUMN] [--rating=COLUMN] [--time=COLUMN]

Makes a party's folder of its own file, split by the manifest's rule; it goes nowhere. Rows of items
outside the catalogue are left out, and named.

  FILE             a .inter file, or a CSV, TSV or parquet file with a row per interaction
  --number=N       of the party, from 0; every party has another
  --user, ...      columns, where their names do not tell
"""

COORDINATE = """\
usage: recbole-fedkd coordinate MANIFEST --address=ADDRESS --out=FOLDER [--secret=FILE]
                                [--certificate=FILE --private-key=FILE]

Waits for all parties, trains, and writes FOLDER/result.json. Killed at any moment, the same command
goes on where it was. Without a certificate nothing is encrypted: good for one machine, or a
network that you trust.

  --address=ADDRESS   unix:FILE, HOST:PORT, or flower:HOST:PORT, a SuperLink on this machine
  --secret=FILE       a key that parties must know, such as of: openssl rand -hex 32
  --certificate=FILE  TLS: a PEM file by which parties know the coordinator ...
  --private-key=FILE  ... and that of its key
  --authority=FILE    of flower: a PEM file of who has signed the SuperLink's certificate
"""

PARTY = """\
usage: recbole-fedkd party FOLDER --manifest=FOLDER --address=ADDRESS [--secret=FILE]
                           [--authority=FILE] [--node-key=FILE]

One party of a federation: goes to the coordinator and answers what it asks, until it is ended.
Killed at any moment, the same command goes on where it was.

  --address=ADDRESS of the coordinator, or of its SuperLink (flower:HOST:PORT); or flower:unix:FILE,
                    a socket at which a node of Flower's own asks
  --secret=FILE     the key that the coordinator asks for
  --authority=FILE  TLS: a PEM file of who has signed the coordinator's certificate, or of the
                    certificate itself
  --node-key=FILE   of flower: the private key by which the SuperLink knows the party
"""

STATUS = """\
usage: recbole-fedkd status FOLDER

How a federation is, of the folder that coordinate has as --out: the round, every party with its
samples, when it was heard last and how often it was missing, bytes, and the validation curve. The
same is in FOLDER/log.jsonl, a line of JSON for every event.
"""

COST = """\
usage: recbole-fedkd cost --model=MODEL --dataset=DATASET [--key=value ...] [NETWORK]
       recbole-fedkd cost RUN [NETWORK]

What a federation would cost: bytes of a round and of all, and seconds on a network. Runs an
exchange in stages, if there is one, and three rounds here, of which nothing is kept, for sizes of
messages and seconds of training; of a finished run's folder the record is taken, which also says
how long the best round would have taken to reach.

A round is as long as its slowest client: message down, training, message up.

  --uplink=10          Mbit/s from a client
  --downlink=50        Mbit/s to a client
  --latency=40         milliseconds, one way
  --slowdown=1         how many times longer a client trains than this machine
  --stragglers=SPREAD  what a client's round is longer or shorter than usual: none,
                       lognormal:<sigma> or pareto:<index>
"""
