//! Reproducible random numbers: SplitMix64. Tests and benchmarks print the seed, so that a run can be repeated.

/// A SplitMix64 generator.
#[derive(Clone, Debug)]
pub struct SeededRandom(u64);

impl SeededRandom {
    /// Equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, uniform over all of `u64`.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform over `least..=most`.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        let span = u128::from(most.saturating_sub(least)) + 1;
        // The product's upper half is less than the span, so it fits a `u64`.
        least + u64::try_from((u128::from(self.next_u64()) * span) >> 64).unwrap_or(0)
    }

    /// Permutes in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, things: &mut [T]) {
        for last in (1..things.len()).rev() {
            let other = usize::try_from(self.between(0, last as u64)).unwrap_or(0);
            things.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_within_their_bounds() {
        let (mut one, mut two) = (SeededRandom::new(7), SeededRandom::new(7));
        let numbers: Vec<u64> = (0..1000).map(|_| one.between(3, 9)).collect();
        assert!((0..1000).all(|at| two.between(3, 9) == numbers[at]));
        assert_eq!((numbers.iter().min(), numbers.iter().max()), (Some(&3), Some(&9)));
        assert_eq!(SeededRandom::new(1).between(5, 5), 5);
        let mut things: Vec<u32> = (0..50).collect();
        one.shuffle(&mut things);
        assert_ne!(things, (0..50).collect::<Vec<u32>>());
        things.sort_unstable();
        assert_eq!(things, (0..50).collect::<Vec<u32>>());
    }
}
