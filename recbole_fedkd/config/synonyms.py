"""What others call the keys of this package: papers, other federated frameworks, deep-learning libraries."""

from __future__ import annotations

from collections.abc import Container

_CALLED: dict[str, tuple[str, ...]] = {
    "client_num": (
        "num_clients", "n_clients", "nclients", "clients", "clients_num", "client_number", "number_of_clients",
        "client_count", "num_users_per_client", "total_clients", "num_client", "n_client", "num_parties", "num_nodes",
    ),
    "clients_per_round": (
        "fraction_fit", "client_fraction", "participation", "participation_rate", "participation_ratio", "c", "frac",
        "fraction", "sample_rate", "sampling_rate", "client_sampling", "num_sampled_clients", "sampled_clients",
        "num_clients_per_round", "client_num_per_round", "client_num_in_round", "clients_num_per_round", "min_fit_clients",
        "clients_per_epoch", "join_ratio", "join_rate", "client_ratio", "client_rate",
    ),
    "min_clients": ("min_available_clients", "min_completed_clients", "min_responses", "min_num_clients"),
    "epochs": (
        "num_rounds", "rounds", "n_rounds", "communication_rounds", "comm_rounds", "comm_round", "global_rounds",
        "global_epochs", "global_epoch", "num_epochs", "n_epochs", "epoch", "max_epochs", "max_rounds", "round_num",
        "round", "num_round", "train_rounds", "epoch_num", "max_epoch",
    ),
    "local_epochs": (
        "local_steps", "local_epoch", "e", "local_ep", "local_eps", "num_local_epochs", "n_local_epochs", "local_iters",
        "local_iterations", "local_rounds", "client_epochs", "epochs_per_round", "inner_epochs", "local_updates",
    ),
    "learning_rate": ("lr", "eta", "step_size", "client_lr", "client_learning_rate", "local_lr", "rate"),
    "server_learning_rate": ("server_lr", "global_lr", "global_learning_rate", "slr", "server_rate"),
    "server_optimizer": ("server_opt", "server_optim", "fed_optimizer", "fedopt", "server_learner"),
    "train_batch_size": ("batch_size", "bs", "batch", "b", "local_batch_size", "local_bs", "batchsize", "train_batch"),
    "eval_batch_size": ("test_batch_size", "valid_batch_size", "test_bs", "batch_size_eval", "val_batch_size"),
    "learner": ("optimizer", "optim", "opt", "optimiser", "client_optimizer", "local_optimizer"),
    "weight_decay": ("wd", "l2", "l2_reg", "l2_penalty", "lambda_l2"),
    "proximal_weight": ("mu", "prox", "prox_mu", "fedprox_mu", "proximal_mu", "mu_prox", "fedprox", "proximal"),
    "embedding_size": (
        "embedding_dim", "emb_dim", "latent_dim", "emb_size", "embed_dim", "embed_size", "dim", "factors", "n_factors",
        "latent_factors", "num_factors", "factor_num", "embedding_dimension",
    ),
    "hidden_sizes": ("hidden_dims", "hidden_dim", "hidden_units", "mlp_layers", "layer_sizes"),
    "dropout_prob": ("dropout", "dropout_rate", "drop_rate", "p_dropout", "drop_prob"),
    "attention_heads": ("num_heads", "n_heads", "heads", "head_num", "nheads"),
    "history_length": ("history_len", "max_history", "max_len", "max_seq_length", "seq_length", "max_history_length"),
    "temperature": ("temp", "t", "tau", "kd_temperature", "distill_temperature", "distillation_temperature", "kd_temp"),
    "alpha": ("kd_weight", "kd_alpha", "distill_weight", "distillation_weight", "kl_weight", "kd_lambda", "lambda_kd"),
    "gamma": ("ce_weight", "kd_gamma"),
    "gpu_id": ("device", "cuda", "gpu", "gpus", "gpu_ids", "cuda_device", "device_id", "use_cuda", "no_cuda", "accelerator"),
    "aggregation": ("aggregator", "aggregation_method", "agg", "aggregate"),
    "strategy": ("algorithm", "method", "algo", "fl_method", "federated_algorithm", "alg", "fed_alg", "framework"),
    "backbone": ("network", "net", "architecture", "arch", "encoder"),
    "partition": (
        "partition_method", "partitioner", "split_method", "data_split", "non_iid", "iid", "noniid",
        "dirichlet_alpha", "dirichlet", "dirichlet_beta", "alpha_dirichlet", "diri_alpha", "concentration",
    ),
    "stopping_step": (
        "early_stop", "early_stopping", "early_stop_patience", "early_stopping_patience", "patience",
        "early_stopping_rounds", "early_stop_rounds",
    ),
    "eval_step": ("eval_every", "eval_freq", "eval_interval", "test_every", "frequency_of_the_test", "valid_step"),
    "train_neg_sample_args": (
        "num_negatives", "neg_num", "n_neg", "num_neg", "negative_num", "n_negs", "num_negative", "negatives", "neg_ratio",
        "negative_samples", "num_ng", "neg_sample_num", "num_neg_samples",
    ),
    "codecs": ("compression", "compressor", "codec", "quantization", "quantisation", "compress", "quantize"),
    "top_k_share": ("top_k_ratio", "sparsity", "compression_ratio", "compress_ratio"),
    "seed": ("random_seed", "manual_seed", "rng_seed", "random_state"),
    "data_path": ("data_dir", "data_root", "dataset_path", "dataset_dir", "data_folder", "datadir", "path", "root"),
    "checkpoint_dir": ("output_dir", "save_dir", "checkpoint_path", "ckpt_dir", "out_dir", "save_path", "model_dir"),
    "resume": ("ckpt", "checkpoint", "load_from", "resume_from", "load_path", "resume_path", "checkpoint_file"),
    "result_file": ("out", "output", "output_file", "results_file", "result_path", "result_dir", "out_file", "save_results"),
    "torch_threads": ("threads", "num_threads", "n_threads", "nthreads"),
    "worker": ("workers", "num_workers", "n_workers", "dataloader_workers"),
    "topk": ("k", "ks", "top_k", "topks", "top_ks", "cutoff", "cutoffs", "at_k"),
    "metrics": ("metric", "eval_metric", "eval_metrics"),
    "valid_metric": ("monitor", "val_metric", "validation_metric", "best_metric", "early_stop_metric"),
    "eval_args": ("split", "split_ratio", "test_ratio", "train_ratio", "valid_ratio", "leave_one_out", "order", "group_by"),
    "config_files": ("config", "config_file", "config_file_list", "configs", "cfg"),
    "dataset": ("data", "data_name", "dataset_name", "datasets", "ds"),
    "model": ("model_name", "models", "recommender", "model_class"),
    "USER_ID_FIELD": ("user_field", "user_id_field", "user_col", "uid_field", "user_column"),
    "ITEM_ID_FIELD": ("item_field", "item_id_field", "item_col", "iid_field", "item_column"),
    "RATING_FIELD": ("rating_field", "rating_col", "rating_column"),
    "TIME_FIELD": ("time_field", "time_col", "timestamp_field", "timestamp_col", "time_column"),
    "field_separator": ("sep", "separator", "delimiter", "delim"),
    "rating_threshold": ("label_threshold", "positive_threshold", "rating_thres"),
    "show_progress": ("progress", "progress_bar", "verbose", "tqdm", "quiet"),
    "state": ("log_level", "loglevel", "logging_level"),
    "clip_grad_norm": ("max_grad_norm", "grad_clip", "clip_norm", "gradient_clip", "clip", "clip_grad", "max_norm"),
    "private_parameters": ("private_params", "local_parameters", "personal_layers", "local_layers", "personalized_layers"),
    "server_momentum": ("momentum", "server_beta", "beta1", "server_beta1"),
    "server_beta2": ("beta2",),
    "trim_ratio": ("trim", "trim_fraction", "trimmed_ratio", "beta_trim"),
    "teacher": ("teacher_model", "teacher_config", "mentor"),
}  # fmt: skip
_NOTES = {
    "clients_per_round": "a number of clients, not a share of them",
    "epochs": "of a federation it counts rounds",
    "train_neg_sample_args": "such as {distribution: uniform, sample_num: 4}",
    "eval_args": "such as {split: {RS: [0.8, 0.1, 0.1]}, order: RO, group_by: user}",
    "codecs": "a list such as [int8]",
    "gpu_id": "such as 0; empty for the processor",
    "partition": "such as random, user or dirichlet:0.5",
    "clip_grad_norm": "such as {max_norm: 5}",
    "topk": "a list such as [10]",
    "metrics": "a list such as [NDCG, MAE]",
}
SYNONYMS: dict[str, str] = {other: key for key, others in _CALLED.items() for other in others}
"""Lower-case name to the key that means it here."""


def called_here(name: str, known: Container[str]) -> str | None:
    """Half a sentence with what a key of another framework is called here; None if it is none of the known keys."""
    key = SYNONYMS.get(name.lower().replace("-", "_").strip("_"))
    if key is None or key not in known or key == name:
        return None
    note = f" ({_NOTES[key]})" if key in _NOTES else ""
    return f"; here it is called {key}{note}"
