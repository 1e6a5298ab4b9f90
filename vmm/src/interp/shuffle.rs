//! What MMX and SSE instructions do by moving lanes about: pure functions on 128 bits.
//!
//! See: Intel SDM vol. 2, each instruction.

/// Lane `n` of `bits` bits.
pub(super) fn lane(value: u128, n: u32, bits: u32) -> u128 {
    value >> (n * bits) & ((1 << bits) - 1)
}

/// `value` with lane `n` replaced.
pub(super) fn with_lane(value: u128, n: u32, bits: u32, new: u128) -> u128 {
    let mask = ((1 << bits) - 1) << (n * bits);
    value & !mask | new << (n * bits) & mask
}

/// Four lanes of `bits` bits, picked by two bits of `order` each: PSHUFD, PSHUFW.
pub(super) fn shuffle_4(value: u128, bits: u32, order: u32) -> u128 {
    (0..4).fold(0, |all, n| with_lane(all, n, bits, lane(value, order >> (2 * n) & 3, bits)))
}

/// PSHUFLW.
pub(super) fn shuffle_low(value: u128, order: u32) -> u128 {
    with_lane(value, 0, 64, shuffle_4(value, 16, order))
}

/// PSHUFHW.
pub(super) fn shuffle_high(value: u128, order: u32) -> u128 {
    with_lane(value, 1, 64, shuffle_4(value >> 64, 16, order))
}

/// SHUFPS: two lanes of the first, then two of the second.
pub(super) fn shuffle_singles(a: u128, b: u128, order: u32) -> u128 {
    let (low, high) = (shuffle_4(a, 32, order), shuffle_4(b, 32, order));
    with_lane(low, 1, 64, high >> 64)
}

/// SHUFPD.
pub(super) fn shuffle_doubles(a: u128, b: u128, order: u32) -> u128 {
    lane(a, order & 1, 64) | lane(b, order >> 1 & 1, 64) << 64
}

/// The top bits of all lanes of `bits` bits, of the low `width` bits of `value`: PMOVMSKB and its kin.
pub(super) fn signs(value: u128, bits: u32, width: u32) -> u32 {
    (0..width / bits).fold(0, |signs, n| signs | ((value >> (n * bits + bits - 1) & 1) as u32) << n)
}

/// PSLLDQ and PSRLDQ: by bytes; more than 15 leave nothing.
pub(super) fn shift_bytes(value: u128, left: bool, bytes: u32) -> u128 {
    let shifted = if left { value.checked_shl(8 * bytes) } else { value.checked_shr(8 * bytes) };
    shifted.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: u128 = 0x7777_6666_5555_4444_3333_2222_1111_0000;

    #[test]
    fn shuffles_pick_lanes() {
        assert_eq!(shuffle_4(VALUE, 32, 0b00_01_10_11), 0x1111_0000_3333_2222_5555_4444_7777_6666);
        assert_eq!(shuffle_low(VALUE, 0b11_11_11_01), 0x7777_6666_5555_4444_3333_3333_3333_1111);
        assert_eq!(shuffle_high(VALUE, 0b00_00_00_11), 0x4444_4444_4444_7777_3333_2222_1111_0000);
        assert_eq!(
            shuffle_singles(VALUE, !VALUE, 0b11_00_01_11),
            !VALUE >> 96 << 96 | (!VALUE & 0xffff_ffff) << 64 | 0x3333_2222_7777_6666
        );
        assert_eq!(shuffle_doubles(VALUE, !VALUE, 0b01), VALUE >> 64 | !VALUE << 64);
    }

    #[test]
    fn byte_shifts_end_at_sixteen() {
        assert_eq!(shift_bytes(VALUE, true, 15), 0);
        assert_eq!(shift_bytes(VALUE, false, 15), 0x77);
        assert_eq!(shift_bytes(VALUE, false, 16), 0);
        assert_eq!(shift_bytes(VALUE, true, 255), 0);
    }

    #[test]
    fn signs_count_only_the_width() {
        assert_eq!(signs(u128::MAX, 8, 64), 0xff);
        assert_eq!(signs(1 << 127 | 1 << 63, 64, 128), 3);
        assert_eq!(signs(1 << 127 | 1 << 31, 32, 128), 9);
    }
}
