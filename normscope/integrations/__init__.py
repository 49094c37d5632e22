"""Integrations: normscope inside training frameworks and trackers, thin, each imported only when asked for.

    from normscope.integrations.lightning import NormscopeCallback       # lightning.pytorch or pytorch_lightning
    from normscope.integrations.transformers import NormscopeCallback    # the Hugging Face Trainer
    from normscope.integrations.sinks import TensorBoardSink, LoggerSink  # SummaryWriter; anything with .log(d, step=)

    trainer = Trainer(callbacks=[NormscopeCallback("runs/a", every=10, sinks=[TensorBoardSink(writer)])])

Accelerate needs none: `normscope.attach` takes the prepared model and optimizer, and `scaler=accelerator.scaler`.
"""
