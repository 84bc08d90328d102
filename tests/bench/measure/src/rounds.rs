//! Order of the rounds of a measurement, and comparison with baselines.

use crate::chapter::Figure;

/// Yields a new order at each call; another seed gives other orders.
#[derive(Debug)]
pub(crate) struct Shuffle(u64);

impl Shuffle {
    /// Starts from any number.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Fisher-Yates shuffle with xorshift.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let other = usize::try_from(self.0 % (last as u64 + 1)).unwrap_or(0);
            items.swap(last, other);
        }
    }
}

/// `figure` as a share of the mean of two baselines; `None` if that is zero.
pub(crate) fn share(value: f64, before: f64, after: f64) -> Option<f64> {
    let baseline = f64::midpoint(before, after);
    (baseline > 0.0 && value.is_finite()).then(|| value / baseline)
}

/// Median; `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    Figure::of(values, "").map(|figure| figure.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_everybody_once() {
        let mut items: Vec<u32> = (0..20).collect();
        Shuffle::new(42).shuffle(&mut items);
        assert_ne!(items, (0..20).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn a_share_is_of_the_baselines_beside_it() {
        assert_eq!(share(90.0, 80.0, 120.0), Some(0.9));
        assert_eq!(share(90.0, 0.0, 0.0), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
    }
}
