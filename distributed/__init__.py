"""Training on Ray; imports measnet and shards.

the command     train, presets, config, options, dry_run
its process     launch, cluster, lease, initial, restarts, stopping, goodput
each worker     worker is the loop; session the state of the run; schedule, exchange, meter,
                guard, validation, preemption, speed, profiling
the engine      decisions, engine, optimizer, reduction, sharded_state, graphs, compilation
what is kept    checkpoint, checkpoint_writer, run_log, environment
what is shown   progress, hang, mlflow_tracker, mlflow_model, mlflow_restorer
evaluation      evaluate, sources, scoring, scoring_workers, scores, iqa; compare, baselines,
                routing; tables, published, figures
pages           report, pages/
other commands  demo, finetune, cost, serve, serve_app, doctor, node, access
internals/      private parts of other libraries
"""
