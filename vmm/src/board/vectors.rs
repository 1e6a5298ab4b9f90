//! A set of interrupt vectors, as IRR, ISR and TMR are.

/// 256 bits, one for each vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VectorSet([u32; 8]);

impl VectorSet {
    pub(super) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] |= 1 << (vector % 32);
    }

    pub(super) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] &= !(1 << (vector % 32));
    }

    pub(super) fn set(&mut self, vector: u8, present: bool) {
        if present { self.insert(vector) } else { self.remove(vector) }
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)] & (1 << (vector % 32)) != 0
    }

    /// The highest vector, which is the one of the highest priority.
    pub(super) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        let bit = self.0[word].ilog2();
        Some((word as u32 * 32 + bit) as u8)
    }

    /// Vectors 32 * `index` .. 32 * `index` + 31, as the register shows them; `index` is 0..=7.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.0[index & 7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_of_any_pair_is_the_greater() {
        for a in 0..=255 {
            for b in 0..=255 {
                let mut set = VectorSet::default();
                set.insert(a);
                set.insert(b);
                assert_eq!(set.highest(), Some(a.max(b)));
                set.remove(a.max(b));
                assert_eq!(set.highest(), (a != b).then_some(a.min(b)));
                assert_eq!(set.contains(a), a < b);
            }
        }
    }
}
