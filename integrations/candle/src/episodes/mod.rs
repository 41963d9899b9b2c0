//! Episodes: a conversation in topics, a cache for each (EpiCache, arXiv 2509.17396).
//!
//! Segments of the conversation are embedded and clustered; a cluster is an episode. The whole conversation is then read once per
//! episode, block by block on one budget, and after every block the cache keeps what the episode's most central segments look at
//! (policy `epicache`, whose probe is [`Episodes::medoids`] as text). A question is answered from the cache of the episode that it is
//! closest to. On the device there is one cache, whatever the number of episodes; the others wait on the host ([`EpisodeStore`]).

mod embed;
mod kmeans;
mod store;
mod text;

use candle_core::{Result, bail};

pub use embed::{Embedder, TokenMean};
pub use kmeans::{Clusters, KMeans};
pub use store::EpisodeStore;
pub use text::{Utterance, patched_prompt, segments};

use crate::blocks::read_blocks;
use crate::cache::BudgetCache;
use crate::reconstruct::Forward;
use kvbudget::Spans;

/// How a question is compared with the centroids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Match {
    /// By their angle: the paper's.
    #[default]
    Cosine,
    /// By the product with the centroid as it is: the published code's, which favours tight clusters.
    Dot,
}

/// A conversation's segments by topic.
pub struct Episodes {
    embeddings: Vec<Vec<f32>>,
    clusters: Clusters,
}

impl Episodes {
    /// Clusters segments by their embeddings, unit vectors of one length: into fewer episodes than asked for, if there are fewer
    /// segments.
    ///
    /// Errors: no segments, no episodes, vectors of different lengths or with something other than finite numbers in them.
    pub fn fit(embeddings: Vec<Vec<f32>>, kmeans: &KMeans) -> Result<Self> {
        let clusters = kmeans.fit(&embeddings)?;
        Ok(Self { embeddings, clusters })
    }

    /// Number of episodes.
    pub fn len(&self) -> usize {
        self.clusters.centroids.len()
    }

    /// Whether there is none: never.
    pub fn is_empty(&self) -> bool {
        self.clusters.centroids.is_empty()
    }

    /// The episode of each segment.
    pub fn assignment(&self) -> &[usize] {
        &self.clusters.assignment
    }

    /// The `n` segments of an episode closest to its centroid by cosine, in the order in which they were said.
    ///
    /// Errors: no such episode.
    pub fn medoids(&self, episode: usize, n: usize) -> Result<Vec<usize>> {
        let Some(centroid) = self.clusters.centroids.get(episode) else {
            bail!("expected an episode below {}, got {episode}", self.len());
        };
        let of = |&s: &usize| self.clusters.assignment[s] == episode;
        let mut members: Vec<(f64, usize)> = (0..self.embeddings.len())
            .filter(of)
            .map(|s| (compare(&self.embeddings[s], centroid, Match::Cosine), s))
            .collect();
        members.sort_by(|(a, s), (b, t)| b.total_cmp(a).then(s.cmp(t)));
        let mut medoids: Vec<usize> = members.into_iter().take(n).map(|(_, s)| s).collect();
        medoids.sort_unstable();
        Ok(medoids)
    }

    /// The episode that a question's embedding is closest to; the first of equals.
    ///
    /// Errors: a vector of another length.
    pub fn match_query(&self, embedding: &[f32], by: Match) -> Result<usize> {
        let dims = self.embeddings[0].len();
        if embedding.len() != dims {
            bail!("expected an embedding of {dims} numbers, got {}", embedding.len());
        }
        let near = |e: &usize| compare(embedding, &self.clusters.centroids[*e], by);
        let best = (0..self.len()).rev().max_by(|a, b| near(a).total_cmp(&near(b)));
        Ok(best.unwrap_or(0))
    }
}

fn compare(embedding: &[f32], centroid: &[f64], by: Match) -> f64 {
    let dot: f64 = embedding.iter().zip(centroid).map(|(&x, c)| f64::from(x) * c).sum();
    let norm = centroid.iter().map(|c| c * c).sum::<f64>().sqrt();
    match by {
        Match::Dot => dot,
        // Only the order among centroids matters, so the question's own norm does not.
        Match::Cosine if norm > 0.0 => dot / norm,
        Match::Cosine => 0.0,
    }
}

/// Reads a conversation once per probe into sequence 0 of `cache`, which leaves with the store, block by block on the cache's budget.
///
/// Where the whole conversation fits nothing is evicted, whatever the probe: it is read once and shared.
///
/// Errors: those of [`read_blocks`], no probes, a cache without a sequence.
pub fn read_episodes(
    cache: &mut BudgetCache,
    ids: &[u32],
    spans: &Spans,
    probes: &[Vec<u32>],
    block: usize,
    forward: &mut Forward<'_>,
) -> Result<EpisodeStore> {
    if probes.is_empty() {
        bail!("expected a probe for each episode, got none");
    }
    let mut store = EpisodeStore::default();
    for probe in probes {
        if let Some(shared) = store.whole() {
            store.share(shared);
            continue;
        }
        let mut empty = cache.empty_sequence()?;
        empty.set_spans(spans.clone());
        cache.switch_sequence(0, empty)?;
        read_blocks(cache, 0, ids, block, probe, forward)?;
        let empty = cache.empty_sequence()?;
        store.put(cache.switch_sequence(0, empty)?);
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn episodes() -> Episodes {
        let unit = |degrees: f32| {
            let (y, x) = degrees.to_radians().sin_cos();
            vec![x, y]
        };
        let angles = [0.0, 92.0, 10.0, 88.0, 4.0, 90.0, 110.0];
        Episodes::fit(angles.map(unit).to_vec(), &KMeans { clusters: 2, ..KMeans::default() })
            .unwrap()
    }

    #[test]
    fn medoids_are_central_and_in_the_order_of_time() {
        let episodes = episodes();
        let flat = episodes.assignment()[0];
        assert_eq!(
            episodes.assignment(),
            [0, 1, 0, 1, 0, 1, 1].map(|e| if e == 0 { flat } else { 1 - flat })
        );
        // The centroids lie at 4.7 and 95 degrees.
        assert_eq!(episodes.medoids(flat, 2).unwrap(), [0, 4]);
        assert_eq!(episodes.medoids(1 - flat, 2).unwrap(), [1, 5]);
        assert_eq!(episodes.medoids(flat, 9).unwrap(), [0, 2, 4]);
        assert!(episodes.medoids(2, 1).unwrap_err().to_string().contains("below 2"));
    }

    #[test]
    fn the_published_match_favours_tight_clusters() {
        // At 50 degrees the second centroid, at 95, is nearer by angle than the first; it is also the looser cluster.
        let episodes = episodes();
        let flat = episodes.assignment()[0];
        let at = |degrees: f32| {
            let (y, x) = degrees.to_radians().sin_cos();
            [x, y]
        };
        assert_eq!(episodes.match_query(&at(49.95), Match::Cosine).unwrap(), 1 - flat);
        assert_eq!(episodes.match_query(&at(49.95), Match::Dot).unwrap(), flat);
        assert!(episodes.match_query(&[1.0], Match::Dot).is_err());
    }
}
