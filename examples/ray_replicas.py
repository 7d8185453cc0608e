"""Two replicas of the bundled model on a local cluster of Ray, asked by OpenAI's client.

Needs ``pip install 'nemo-engine[ray]' openai``.
"""

from __future__ import annotations

import openai
from ray import serve

from nemo_engine.ray import build_app

app = build_app(
    {
        "model": "nemo-tiny",
        "engine": {"device": "cpu", "num_kv_pages": 400, "max_num_seqs": 8, "max_model_len": 1024},
        "num_replicas": 2,
        "session_affinity": True,
    }
)
serve.start(http_options={"host": "127.0.0.1", "port": 8124})
serve.run(app, name="nemo", route_prefix="/")
client = openai.OpenAI(base_url="http://127.0.0.1:8124/v1", api_key="none")
chat = [{"role": "user", "content": "Hello"}]
# The header keeps a conversation on the replica that has its prefix in its cache.
stream = client.chat.completions.create(
    model="nemo-tiny", messages=chat, max_tokens=40, stream=True, extra_headers={"x-session-id": "chat-1"}
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
serve.shutdown()
