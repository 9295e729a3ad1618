"""Merge four networks, each fine-tuned on digits seen another way, into one that serves all four.

The pictures come with scikit-learn. No label is used after fine-tuning: the mask is learnt from 400 unlabelled digits.
"""

from polyspan.checkpoints import ConcreteMerger, TaskVector
from polyspan.claims.concrete_merging import VIEWS, on_digits, prepare


def main(steps: int = 80) -> None:
    world = prepare(on_digits(0), 0)
    vectors = {view: TaskVector(world.base, net) for view, net in world.finetuned.items()}
    print("cosines of task vectors with that of upright digits:")
    for view in VIEWS[1:]:
        print(f"  {view:>9}  {vectors[view].cosine(vectors['upright']):.2f}")
    merger = ConcreteMerger(lr=0.03, steps=steps, batch_size=32)
    merger.fit(world.base, world.finetuned, world.adapt, world.heads)
    entropy = merger.history_["mask"]
    print(
        f"mean entropy of predictions: {entropy[0]:.2f} nats at first, {entropy[-1]:.2f} after {merger.n_steps_} steps"
    )
    report = merger.evaluate(world.test)
    print(f"{'':>16}" + "".join(f"{view:>10}" for view in VIEWS) + f"{'mean':>10}")
    for method, found in report.accuracy.items():
        print(f"{method:>16}" + "".join(f"{found[view]:10.1%}" for view in VIEWS) + f"{report.mean(method):10.1%}")


if __name__ == "__main__":
    main()
