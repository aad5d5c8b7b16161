"""What test_anthropic.py runs in the anthropic package's own environment. Arguments: base URL, model."""

import json
import sys

import anthropic

url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
ask = {
    "model": model,
    "max_tokens": 24,
    "system": "Answer in one sentence.",
    "messages": [{"role": "user", "content": "Name a colour."}],
    "extra_body": {"temperature": 0},  # the package has no sampling fields of its own
}
whole = client.messages.create(**ask)
with client.messages.stream(**ask) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
counted = client.messages.count_tokens(model=model, system=ask["system"], messages=ask["messages"])
stopped = client.messages.create(**ask | {"stop_sequences": [whole.content[0].text[5:9]]})
schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
schema["additionalProperties"] = False
formed = client.messages.create(**ask, output_config={"format": {"type": "json_schema", "schema": schema}})
block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
try:
    client.messages.create(**ask | {"messages": [{"role": "user", "content": [block]}]})
    refusal = ""
except anthropic.BadRequestError as error:
    refusal = error.body["error"]["message"]
found = {
    "version": anthropic.__version__,
    "whole": whole.model_dump(),
    "text": text,
    "final": final.model_dump(),
    "counted": counted.input_tokens,
    "stopped": stopped.model_dump(),
    "formed": formed.content[0].text,
    "refusal": refusal,
}
sys.stdout.write(json.dumps(found, default=str) + "\n")
