//! A little deflate (RFC 1951): what the images here need to have compressed clusters, and to read
//! them. Bytes are stored, runs of zeros become matches of fixed Huffman codes.

use std::vec::Vec;

/// Symbols of the fixed Huffman code: the end of a block, and two lengths.
const END: u32 = 256;
const UP_TO_257: u32 = 284;
const LEN_258: u32 = 285;

/// Bits, the first in the lowest place of the first byte.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    free: u32,
}

impl Bits {
    fn push(&mut self, value: u32, count: u32) {
        for at in 0..count {
            if self.free == 0 {
                self.bytes.push(0);
                self.free = 8;
            }
            let last = self.bytes.last_mut().expect("just pushed");
            *last |= u8::from(value >> at & 1 != 0) << (8 - self.free);
            self.free -= 1;
        }
    }

    /// Huffman codes begin with their highest bit.
    fn push_code(&mut self, value: u32, count: u32) {
        for at in (0..count).rev() {
            self.push(value >> at & 1, 1);
        }
    }

    fn symbol(&mut self, symbol: u32) {
        match symbol {
            0..144 => self.push_code(0x30 + symbol, 8),
            144..256 => self.push_code(0x190 + symbol - 144, 9),
            256..280 => self.push_code(symbol - 256, 7),
            _ => self.push_code(0xc0 + symbol - 280, 8),
        }
    }

    fn zeros(&mut self, count: usize, last: bool) {
        self.push(u32::from(last), 1);
        self.push(1, 2);
        self.symbol(0);
        let mut left = count - 1;
        while left != 0 {
            let length = match left {
                258.. => {
                    self.symbol(LEN_258);
                    258
                }
                227..258 => {
                    self.symbol(UP_TO_257);
                    self.push(u32::try_from(left - 227).expect("5 bits"), 5);
                    left
                }
                _ => {
                    self.symbol(0);
                    left -= 1;
                    continue;
                }
            };
            // A distance of one byte.
            self.push_code(0, 5);
            left -= length;
        }
        self.symbol(END);
    }

    fn stored(&mut self, bytes: &[u8], last: bool) {
        self.push(u32::from(last), 1);
        self.push(0, 2);
        self.free = 0;
        let len = u16::try_from(bytes.len()).expect("a short run");
        self.push(len.into(), 16);
        self.push((!len).into(), 16);
        self.bytes.extend(bytes);
    }
}

/// Compresses bytes whose zeros come by `grain`.
pub(super) fn deflate(bytes: &[u8], grain: usize) -> Vec<u8> {
    let mut out = Bits::default();
    let zero = |chunk: &&[u8]| chunk.iter().all(|&byte| byte == 0);
    let mut rest = bytes;
    while !rest.is_empty() {
        let is_zero = zero(&rest.chunks(grain).next().expect("not empty"));
        let same = rest.chunks(grain).take_while(|chunk| zero(chunk) == is_zero);
        let count: usize = same.map(<[u8]>::len).sum();
        let (run, behind) = rest.split_at(count);
        rest = behind;
        if is_zero {
            out.zeros(count, rest.is_empty());
        } else {
            out.stored(run, rest.is_empty());
        }
    }
    out.bytes
}

/// Where a reader is.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn bits(&mut self, count: u32) -> Option<u32> {
        let mut value = 0;
        for place in 0..count {
            let byte = *self.bytes.get(self.at / 8)?;
            value |= u32::from(byte >> (self.at % 8) & 1) << place;
            self.at += 1;
        }
        Some(value)
    }

    fn symbol(&mut self) -> Option<u32> {
        let mut code = 0;
        for _ in 0..7 {
            code = code << 1 | self.bits(1)?;
        }
        if code < 24 {
            return Some(code + 256);
        }
        code = code << 1 | self.bits(1)?;
        match code {
            0x30..0xc0 => Some(code - 0x30),
            0xc0..0xc8 => Some(code - 0xc0 + 280),
            _ => Some((code << 1 | self.bits(1)?) - 0x190 + 144),
        }
    }
}

/// Inflates what [`deflate`] makes, to exactly `len` bytes; what follows does not matter, be it of
/// the stream or behind it.
#[must_use]
pub fn inflate(bytes: &[u8], len: usize) -> Option<Vec<u8>> {
    let (mut reader, mut out) = (Reader { bytes, at: 0 }, Vec::new());
    loop {
        let last = reader.bits(1)? == 1;
        match reader.bits(2)? {
            0 => {
                reader.at = reader.at.next_multiple_of(8);
                let (count, inverse) = (reader.bits(16)?, reader.bits(16)?);
                if count != !inverse & 0xffff {
                    return None;
                }
                let (start, end) = (reader.at / 8, reader.at / 8 + count as usize);
                out.extend_from_slice(bytes.get(start..end)?);
                reader.at = end * 8;
            }
            1 => loop {
                if out.len() >= len {
                    break;
                }
                let length = match reader.symbol()? {
                    END => break,
                    UP_TO_257 => 227 + reader.bits(5)? as usize,
                    LEN_258 => 258,
                    literal => {
                        out.push(u8::try_from(literal).ok()?);
                        continue;
                    }
                };
                if reader.bits(5)? != 0 {
                    return None;
                }
                let byte = *out.last()?;
                out.resize(out.len() + length, byte);
            },
            _ => return None,
        }
        if last || out.len() >= len {
            out.truncate(len);
            return (out.len() == len).then_some(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deflated_is_inflated() {
        for pattern in 0..16_u32 {
            let mut bytes = Vec::new();
            for place in 0..4 {
                let zero = pattern >> place & 1 == 0;
                bytes.extend((0..512_u32).map(|at| if zero { 0 } else { (at % 255) as u8 + 1 }));
            }
            let mut packed = deflate(&bytes, 512);
            assert!(packed.len() <= pattern.count_ones() as usize * 517 + 80, "{}", packed.len());
            packed.extend([0xff; 9]);
            assert_eq!(inflate(&packed, bytes.len()), Some(bytes.clone()));
            assert_eq!(inflate(&packed, bytes.len() + 1), None);
            for len in [512, 1000, bytes.len() - 1] {
                assert_eq!(inflate(&packed, len), Some(bytes[..len].to_vec()), "{len}");
            }
        }
    }
}
