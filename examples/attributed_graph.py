"""Find groups in a graph whose vertices carry words, where neither the links nor the words suffice alone.

The graph is generated: 1,000 vertices in 4 groups, 4 in 10 edges at random, 3 in 10 words on the group's topic.
"""

from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfTransformer

from polyspan.cluster import S2CAG, ModularityS2CAG, select_order_decay
from polyspan.data import planted_graph
from polyspan.linalg import clustering_accuracy


def main() -> None:
    world = planted_graph(0, n=1000, n_clusters=4, d=300, degree=5.0, mixing=0.4, words=20.0, topic_share=0.3)
    words = TfidfTransformer().fit_transform(world.attributes).toarray()
    alone = KMeans(4, n_init=10, random_state=0).fit_predict(words)
    print(f"{'words alone, k-means':>24}  {clustering_accuracy(world.labels, alone):.1%}")

    for method in (S2CAG(4, random_state=0), ModularityS2CAG(4, random_state=0)):
        fitted = method.fit(world.attributes, adjacency=world.adjacency)
        score = clustering_accuracy(world.labels, fitted.labels_)
        shares = ", ".join(f"{share:.2f}" for share in fitted.conductance_)
        print(f"{type(fitted).__name__:>24}  {score:.1%}, conductance of the groups {shares}")

    choice = select_order_decay(world.attributes, world.adjacency, 4, [(0, 0.9), (2, 0.9), (10, 0.9), (40, 1.0)])
    print(f"hops chosen without labels: {choice.order} with decay {choice.decay}")


if __name__ == "__main__":
    main()
