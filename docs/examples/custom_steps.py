"""Steps of one's own around the model, without a change to the helpers.

In a stream, on any runner, with all arguments of `python -m helpers.pipeline`:

    python docs/examples/custom_steps.py --messages-subscription ... --responses-topic ... \\
        --state-dict-path gs://BUCKET/NAME.pt --model-name MODEL --runner DataflowRunner ...

From a text file to a text file, on this machine; each line of `answers-00000-of-00001` has a prompt and its
answer, in any order:

    python docs/examples/custom_steps.py --input prompts.txt --output answers \\
        --state-dict-path NAME.pt --model-name MODEL

What is defined in this file travels to the workers with the pipeline. A step that needs a package of your own
is sent along with Beam's `--extra_package`, or goes into the workers' image.
"""

import argparse
import json
import re
import sys

import apache_beam as beam
from apache_beam.io.gcp.pubsub import PubsubMessage

from helpers.pipeline import AskModel, main

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")


def redact(text: str) -> str:
    """The text without e-mail addresses, which the model need not see."""
    return EMAIL.sub("[e-mail]", text)


def redact_message(message: PubsubMessage) -> PubsubMessage:
    """The same for a message. Bytes that are no text stay as they are: such a message is a dead letter."""
    data = redact(message.data.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    return PubsubMessage(
        data, message.attributes, message.message_id, message.publish_time, message.ordering_key
    )


def mark_cut(response: PubsubMessage) -> PubsubMessage:
    """Says in an attribute whether the answer ended for lack of tokens. The data stays as it is: it may be
    JSON."""
    is_cut = response.attributes["finish_reason"] == "length"
    return PubsubMessage(response.data, {**response.attributes, "is_cut": "yes" if is_cut else "no"})


def answer_file(argv: list[str]) -> None:
    """Answers the lines of a file; prompts that fail go to a file of their own, with the reason."""
    parser = argparse.ArgumentParser()
    for name in ("input", "output", "state-dict-path", "model-name"):
        parser.add_argument(f"--{name}", required=True)
    given, beam_arguments = parser.parse_known_args(argv)
    options = beam.options.pipeline_options.PipelineOptions(beam_arguments)
    with beam.Pipeline(options=options) as pipeline:
        prompts = pipeline | beam.io.ReadFromText(given.input) | "Redact" >> beam.Map(redact)
        ask = AskModel(given.model_name, given.state_dict_path, max_response_tokens=32, keyed=True)
        keyed = prompts | "Prompts as keys" >> beam.Map(lambda prompt: (prompt, prompt))
        answers, failed = keyed | ask.with_exception_handling()
        # An answer may have several lines: as JSON it has one.
        answers | "As JSON" >> beam.Map(json.dumps) | beam.io.WriteToText(given.output)
        (
            failed
            | "With reasons" >> beam.Map(lambda one: json.dumps([one.prompt[0], one.error]))
            | "Write failures" >> beam.io.WriteToText(f"{given.output}-failed")
        )


if __name__ == "__main__":
    if any(argument.startswith("--input") for argument in sys.argv):
        answer_file(sys.argv[1:])
    else:
        main(before=beam.Map(redact_message), after=beam.Map(mark_cut))
