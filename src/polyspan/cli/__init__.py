"""The command line: parse, call one function, print. Commands are named by import path, so that --help stays light."""

import os
import signal
import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError

from polyspan.errors import FileError, MissingExtra, NotConverged

from ._output import EXTRA, FILE, INTERRUPTED, STUCK, USAGE

app = App(
    name="polyspan",
    suppress_keyboard_interrupt=False,
    help="Systems about subspaces and structured representations, each with a claim that you can measure again.",
    version=lambda: version("polyspan"),
    help_epilogue=(
        "Results go to stdout, talk to stderr. Exit codes: 0 done, 1 a claim or a check does not hold, "
        "2 wrong use, 3 a file, 4 a missing extra, 5 not converged, 130 interrupted."
    ),
)
align = App(name="align", help="Carry vectors from one embedding space into another.")
cluster = App(name="cluster", help="Find groups in graphs and points by the subspaces they lie on.")
grassmann = App(name="grassmann", help="Classify embeddings by one subspace a class.")
compat = App(name="compat", help="Train encoders whose vectors can be compared with those of older ones.")
crossmodal = App(name="crossmodal", help="Match and retrieve across two spaces trained apart.")
crate = App(name="crate", help="Train and measure transformers that compress tokens towards subspaces.")
retrieve = App(name="retrieve", help="Mend a gallery of retrieval vectors.")
upgrade = App(name="upgrade", help="Move a vector store to another embedding model without embedding it again.")
adapt = App(name="adapt", help="Small adapters of fine-tuned networks, from checkpoints and back.")
embed_table = App(name="embed-table", help="Learn from tables with categorical columns of many values.")
sae = App(name="sae", help="Learn sparse features of activations, and how they multiply.")
segment = App(name="segment", help="Find regions in pictures by multi-head scans.")
text = App(name="text", help="Small language models that mix tokens by planes.")
images = App(name="images", help="Mend and search features of images.")
position = App(name="position", help="Take the position of patches out of dense features.")
rotations = App(name="rotations", help="Convert files of rotations, and find where their numbers jump.")
projector = App(name="projector", help="Train generators, make layers low-rank orthogonal, export and walk directions.")
gaunt = App(name="gaunt", help="Products of spherical-harmonic features, beside those of e3nn.")
ulsam = App(name="ulsam", help="Subspace attention in compact networks, and what it saves.")
gallery = App(name="gallery", help="The web page of all systems and verdicts.")

align.command("polyspan.cli.align:fit", name="fit", help="Fit a map on items that both models have embedded.")
align.command("polyspan.cli.align:apply", name="apply", help="Carry a file of vectors of any size through a map.")
align.command("polyspan.cli.align:score", name="score", help="Measure a map on paired vectors it has not seen.")
cluster.command("polyspan.cli.cluster:graph", name="graph", help="Cluster an attributed graph.")
cluster.command("polyspan.cli.points:points", name="points", help="Cluster rows by the subspaces they lie near.")
cluster.command("polyspan.cli.cluster_images:images", name="images", help="Cluster pictures without labels.")
grassmann.command("polyspan.cli.classify:fit", name="fit", help="Train a classifier on embeddings with labels.")
grassmann.command(
    "polyspan.cli.classify:report", name="report", help="Measure a fitted classifier on labelled embeddings."
)
compat.command("polyspan.cli.compat:train", name="train", help="Train an encoder, compatible with an older one.")
compat.command("polyspan.cli.compat:embed", name="embed", help="Embed a file of feature rows.")
compat.command("polyspan.cli.compat:evaluate", name="evaluate", help="Say which encoders may search whose index.")
crossmodal.command("polyspan.cli.crossmodal:fit", name="fit", help="Find the subspaces in which two spaces agree.")
crossmodal.command("polyspan.cli.crossmodal:match", name="match", help="Match items of two spaces one to one.")
crossmodal.command("polyspan.cli.crossmodal:retrieve", name="retrieve", help="Find items of one space by the other.")
crate.command("polyspan.cli.crate:train", name="train", help="Train on labelled pictures, and measure every layer.")
crate.command("polyspan.cli.crate:report", name="report", help="Measure every layer of a trained network.")
retrieve.command("polyspan.cli.retrieve:debias", name="debias", help="Take the hubs out of a gallery.")
upgrade.command("polyspan.cli.upgrade:plan", name="plan", help="Predict what each way gives and costs, on a sample.")
upgrade.command("polyspan.cli.upgrade:apply", name="apply", help="Fill in new vectors beside those in use.")
upgrade.command("polyspan.cli.upgrade:check", name="check", help="Look at every new vector before it comes in use.")
upgrade.command("polyspan.cli.upgrade:cutover", name="cutover", help="Put the new vectors in use; the old ones stay.")
upgrade.command("polyspan.cli.upgrade:rollback", name="rollback", help="Put the old vectors in use again.")
adapt.command(
    "polyspan.cli.adapt:extract", name="extract", help="Turn a fine-tuned checkpoint into an adapter of its base."
)
adapt.command("polyspan.cli.adapt:merge", name="merge", help="Add an adapter to the weights of its base.")
adapt.command("polyspan.cli.adapt:ranks", name="ranks", help="Say which ranks the updates of a checkpoint need.")
embed_table.command("polyspan.cli.embed_table:train", name="train", help="Learn a column of a table from the others.")
embed_table.command("polyspan.cli.embed_table:predict", name="predict", help="Predict for every row of a table.")
embed_table.command("polyspan.cli.embed_table:report", name="report", help="Say which columns share rows of the table.")
sae.command("polyspan.cli.sae:train", name="train", help="Learn sparse features of activations.")
sae.command("polyspan.cli.sae:probe", name="probe", help="Say how well single features tell labels.")
sae.command("polyspan.cli.sae:interactions", name="interactions", help="Rank features that mean more together.")
sae.command("polyspan.cli.sae:steer", name="steer", help="Write text while features are pushed.")
segment.command("polyspan.cli.segment:train", name="train", help="Train a network that marks regions in pictures.")
segment.command("polyspan.cli.segment:predict", name="predict", help="Mark regions in pictures.")
text.command("polyspan.cli.text:train", name="train", help="Train on a text of your own, and measure rivals beside it.")
text.command("polyspan.cli.text:score", name="score", help="Measure a trained model on another text.")
position.command("polyspan.cli.position:fit", name="fit", help="Find what tells position in dense features.")
position.command("polyspan.cli.position:apply", name="apply", help="Take position out of features.")
position.command("polyspan.cli.position:score", name="score", help="Measure how well position can be told.")
images.command(position)
rotations.command(
    "polyspan.cli.rotations:convert", name="convert", help="Turn a file of rotations from one form into another."
)
rotations.command("polyspan.cli.rotations:breaks", name="breaks", help="Say where the numbers of a path jump.")
rotations.command(
    "polyspan.cli.rotations_compare:compare", name="compare", help="Say which numbers a network learns best for yours."
)
projector.command(
    "polyspan.cli.projector:convert", name="convert", help="Make weights of a checkpoint low-rank orthogonal."
)
projector.command(
    "polyspan.cli.projector:directions", name="directions", help="Export the directions of a checkpoint's layers."
)
projector.command(
    "polyspan.cli.projector_generator:train", name="train", help="Train a small generator with orthogonal layers."
)
projector.command(
    "polyspan.cli.projector_generator:traverse", name="traverse", help="Walk along directions of a generator."
)
gaunt.command("polyspan.cli.gaunt:race", name="race", help="Race the product against e3nn's, on your own irreps.")
ulsam.command("polyspan.cli.ulsam:report", name="report", help="Count parameters and multiply-adds by layer.")
ulsam.command("polyspan.cli.ulsam:replace", name="replace", help="Put attention in the place of blocks.")
ulsam.command("polyspan.cli.ulsam:insert", name="insert", help="Put attention behind blocks.")
gallery.command("polyspan.cli.gallery:build", name="build", help="Write the static site.")
gallery.command("polyspan.cli.gallery:serve", name="serve", help="Build it and serve it on this machine.")
app.command("polyspan.cli.systems:list_", name="list", help="List the systems, or those that match some words.")
app.command("polyspan.cli.systems:show", name="show", help="Tell all about one system.")
app.command("polyspan.cli.claim:claim", name="claim", help="Measure claims again: method against baseline and control.")
app.command("polyspan.cli.doctor:doctor", name="doctor", help="Say what is installed, or what is wrong with a file.")
app.command("polyspan.cli.merge:merge", name="merge", help="Merge fine-tuned checkpoints of one base.")
app.command("polyspan.cli.compress:compress", name="compress", help="Make a language model's checkpoint smaller.")
app.command("polyspan.cli.compare:compare", name="compare", help="Say which units of two networks are the same.")
for group in (
    align,
    upgrade,
    compat,
    retrieve,
    crossmodal,
    cluster,
    images,
    segment,
    text,
    sae,
    embed_table,
    adapt,
    grassmann,
    crate,
    rotations,
    projector,
    gaunt,
    ulsam,
    gallery,
):
    app.command(group)
app.register_install_completion_command(help="Install completion for your shell.")


def run(tokens: list[str] | None = None) -> int:
    """Run one command line and return its exit code; expected errors become one line on stderr."""
    try:
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _complain(str(error), USAGE)
    except FileError as error:
        return _complain(f"{type(error).__name__}: {error}", FILE)
    except MissingExtra as error:
        return _complain(f"MissingExtra: {error}", EXTRA)
    except NotConverged as error:
        return _complain(f"NotConverged: {error}", STUCK)
    except ValueError as error:
        if os.environ.get("POLYSPAN_DEBUG"):
            raise
        return _complain(str(error), USAGE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished is kept, run the same command again to go on", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _complain(text: str, code: int) -> int:
    print("polyspan:", " ".join(text.split()), file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the ``polyspan`` command."""
    sys.exit(run())
