"""Measurements of the running system; each prints tables and writes them to build/, with a JSON.

Shared by all, lower files first:

    findings       the JSON, the tables, targets and verdicts
    processes, process_watch     processors and memory of processes; do all live?
    pictures, workload, export   what is asked, of which checkpoint, in which repository
    script         the same written out, for processes without torch
    limits         what the hardware allows
    load           Ask, Answer, Way: turns put to anything that answers, and whole sessions of them
    engine_way     a way: our engine in this process
    references     a way: transformers, stateless or with a kept cache
    doors, stand   every way into a running server and its session adapter

A file a command: bench (with part, fairness, distance, report, plots), accuracy, adapter_cost,
large_bodies (piece_server), soak (soak_clients), profile (perf_analyzer), hibernate, beside_plain,
hostile/, chaos/, gpu_check/, peers/; `make fuzz` is tests/fuzz;
decoupled_bls and payload_backlog show faults of Triton's and use nothing of ours but the server.
"""
