//! K-means (Lloyd's iterations from k-means++ seeds): the clusters of EpiCache's segments.
//!
//! A page of loops over a few hundred vectors: a crate for it (linfa-clustering) would bring ndarray and a second line of `rand`, and
//! promises neither the same clusters from version to version nor what becomes of an empty one.

use candle_core::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Parameters; the defaults are those of EpiCache's code and the library it calls.
#[derive(Clone, Debug)]
pub struct KMeans {
    /// Clusters, at most one per vector.
    pub clusters: usize,
    /// Runs from other seeds, of which the one of least inertia counts.
    pub restarts: usize,
    /// Lloyd iterations of a run, at most.
    pub iterations: usize,
    /// Centroids that move less end a run: their squared moves, relative to the mean variance of a dimension.
    pub tolerance: f64,
    /// Same seed, same clusters.
    pub seed: u64,
}

impl Default for KMeans {
    fn default() -> Self {
        Self { clusters: 4, restarts: 10, iterations: 300, tolerance: 1e-4, seed: 42 }
    }
}

/// What a fit found.
#[derive(Clone, Debug)]
pub struct Clusters {
    /// Means of the clusters, not normalised.
    pub centroids: Vec<Vec<f64>>,
    /// Cluster of each vector.
    pub assignment: Vec<usize>,
    /// Sum of squared distances to the centroids.
    pub inertia: f64,
}

impl KMeans {
    /// Clusters vectors of one length.
    ///
    /// Errors: no vectors, no clusters, vectors of different lengths or with something other than finite numbers in them.
    pub fn fit(&self, points: &[Vec<f32>]) -> Result<Clusters> {
        let dims = points.first().map_or(0, Vec::len);
        let sound = |p: &Vec<f32>| p.len() == dims && p.iter().all(|x| x.is_finite());
        if dims == 0 || self.clusters == 0 || self.restarts == 0 || !points.iter().all(sound) {
            bail!(
                "k-means of {} vectors in {} clusters, {} runs: expected some of each, finite and of one length",
                points.len(),
                self.clusters,
                self.restarts
            );
        }
        let points: Vec<Vec<f64>> =
            points.iter().map(|p| p.iter().map(|&x| f64::from(x)).collect()).collect();
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut best = self.run(&points, &mut random);
        for _ in 1..self.restarts {
            let run = self.run(&points, &mut random);
            if run.inertia < best.inertia {
                best = run;
            }
        }
        Ok(best)
    }

    fn run(&self, points: &[Vec<f64>], random: &mut ChaCha8Rng) -> Clusters {
        let mut centroids = seeds(points, self.clusters.min(points.len()), random);
        let still = self.tolerance * variance(points);
        for _ in 0..self.iterations {
            let (assignment, distances) = assign(points, &centroids);
            let means = means(points, assignment, distances, centroids.len());
            let moved: f64 = centroids.iter().zip(&means).map(|(a, b)| distance(a, b)).sum();
            centroids = means;
            if moved <= still {
                break;
            }
        }
        let (assignment, distances) = assign(points, &centroids);
        Clusters { centroids, assignment, inertia: distances.iter().sum() }
    }
}

/// k-means++: the next seed is a vector drawn by its squared distance to the seeds so far.
fn seeds(points: &[Vec<f64>], count: usize, random: &mut ChaCha8Rng) -> Vec<Vec<f64>> {
    let mut seeds = vec![points[random.random_range(0..points.len())].clone()];
    while seeds.len() < count {
        let (_, distances) = assign(points, &seeds);
        let mut left = random.random::<f64>() * distances.iter().sum::<f64>();
        let drawn = distances.iter().position(|&d| {
            left -= d;
            left < 0.0
        });
        // All vectors are seeds already, or as good as that.
        let drawn = drawn.unwrap_or_else(|| random.random_range(0..points.len()));
        seeds.push(points[drawn].clone());
    }
    seeds
}

/// The nearest centroid of each vector, the first of equals, and the squared distance to it.
fn assign(points: &[Vec<f64>], centroids: &[Vec<f64>]) -> (Vec<usize>, Vec<f64>) {
    let nearest = |point: &Vec<f64>| {
        let distances = centroids.iter().map(|c| distance(point, c)).enumerate();
        distances.fold((0, f64::INFINITY), |best, next| if next.1 < best.1 { next } else { best })
    };
    points.iter().map(nearest).unzip()
}

/// Means of the clusters. An empty one takes over the vector that is farthest from its own centroid.
fn means(
    points: &[Vec<f64>],
    mut assignment: Vec<usize>,
    mut distances: Vec<f64>,
    clusters: usize,
) -> Vec<Vec<f64>> {
    let mut sizes = vec![0usize; clusters];
    assignment.iter().for_each(|&c| sizes[c] += 1);
    for empty in 0..clusters {
        if sizes[empty] == 0 {
            // Out of a cluster that has others: there are no more clusters than vectors.
            let far = (0..points.len())
                .filter(|&p| sizes[assignment[p]] > 1)
                .max_by(|&a, &b| distances[a].total_cmp(&distances[b]));
            let Some(far) = far else { continue };
            sizes[assignment[far]] -= 1;
            (assignment[far], distances[far], sizes[empty]) = (empty, 0.0, 1);
        }
    }
    let mut means = vec![vec![0.0; points[0].len()]; clusters];
    for (point, &cluster) in points.iter().zip(&assignment) {
        let part = 1.0 / sizes[cluster] as f64;
        means[cluster].iter_mut().zip(point).for_each(|(mean, x)| *mean += x * part);
    }
    means
}

/// Mean variance of a dimension.
fn variance(points: &[Vec<f64>]) -> f64 {
    let centre = means(points, vec![0; points.len()], vec![0.0; points.len()], 1).remove(0);
    let squares: f64 = points.iter().map(|point| distance(point, &centre)).sum();
    squares / (points.len() * centre.len()) as f64
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs() -> Vec<Vec<f32>> {
        let centres = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]];
        let offsets = [[0.3, 0.1], [-0.2, 0.4], [0.0, -0.5], [-0.1, 0.0]];
        let point = |c: [f32; 2], o: [f32; 2]| vec![c[0] + o[0], c[1] + o[1]];
        offsets.iter().flat_map(|&o| centres.iter().map(move |&c| point(c, o))).collect()
    }

    #[test]
    fn blobs_are_found_and_their_means_are_centroids() {
        let found = KMeans { clusters: 3, ..KMeans::default() }.fit(&blobs()).unwrap();
        for (i, &cluster) in found.assignment.iter().enumerate() {
            assert_eq!(cluster, found.assignment[i % 3], "{:?}", found.assignment);
        }
        let first = &found.centroids[found.assignment[0]];
        assert!(first.iter().all(|x| x.abs() < 1e-6), "{first:?}");
        // Squared offsets of three blobs.
        assert!(
            (found.inertia - 3.0 * (0.10 + 0.20 + 0.25 + 0.01)).abs() < 1e-5,
            "{}",
            found.inertia
        );
    }

    #[test]
    fn more_clusters_never_fit_worse_and_a_seed_fixes_them() {
        let fit = |clusters| KMeans { clusters, ..KMeans::default() }.fit(&blobs()).unwrap();
        let inertias: Vec<f64> = (1..=14).map(|k| fit(k).inertia).collect();
        assert!(inertias.windows(2).all(|w| w[1] <= w[0] + 1e-9), "{inertias:?}");
        // No more clusters than vectors.
        assert_eq!((fit(14).centroids.len(), inertias[13]), (12, 0.0));
        assert_eq!(fit(4).assignment, fit(4).assignment);
    }

    #[test]
    fn an_empty_cluster_takes_the_farthest_vector() {
        let points = vec![vec![0.0], vec![1.0], vec![9.0]];
        let found = means(&points, vec![0, 0, 0], vec![1.0, 0.0, 64.0], 2);
        assert_eq!(found, [[0.5], [9.0]]);
    }

    #[test]
    fn nonsense_is_refused() {
        let fit = |points: &[Vec<f32>]| KMeans::default().fit(points).is_err();
        assert!(fit(&[]) && fit(&[vec![1.0], vec![]]) && fit(&[vec![f32::NAN]]));
        // Equal vectors are one place, however many clusters.
        let same =
            KMeans::default().fit(&[vec![1.0, 2.0], vec![1.0, 2.0], vec![1.0, 2.0]]).unwrap();
        assert_eq!((same.centroids.len(), same.inertia), (3, 0.0));
    }
}
