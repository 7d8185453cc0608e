# %% The cells of a notebook: no function, no guard, no process of its own. Run it as a script, or cell by cell.
from nemo_engine import Engine, SamplingParams

# %%
engine = Engine("nemo-tiny", device="cpu", max_model_len=512)

# %%
(answer,) = engine.chat([{"role": "user", "content": "What does os.path.join do?"}])
print(answer.outputs[0].text)

# %% A loop that is left early ends its request.
for delta in engine.stream("The heapq module", SamplingParams(max_tokens=100)):
    print(delta.outputs[0].text, end="")
    if delta.outputs[0].text.endswith("."):
        break

# %%
print(engine.stats())
engine.close()
