"""The device half: request table, batch, KV cache, sampler. Computes step plans; knows neither scheduler nor text."""
