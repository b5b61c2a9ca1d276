//! Inflating one compressed cluster, from bytes to bytes.
//!
//! The bytes come from an image that somebody else may have made. So the output has exactly the
//! size of a cluster, whatever the stream says; a zstd frame may ask for a window of at most
//! [`MAX_WINDOW`], and a deflate stream needs none beside its output. What follows the end of the
//! stream is not looked at: it may belong to the next cluster.
//!
//! Where a stream yields more than a cluster, this does as QEMU does: of a deflate stream the first
//! cluster counts, and a zstd frame that goes on is an error.

use std::fmt;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use qcow2::Compression;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read;

/// The largest zstd window: what RFC 8878 wants every decoder to have.
const MAX_WINDOW: u64 = 8 << 20;

/// Why a cluster cannot be inflated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Not a valid stream, or one that is cut off.
    Data,
    /// The stream ends before the cluster does.
    Short,
    /// The frame (zstd) goes on behind the end of the cluster.
    Long,
    /// Needs more memory than a cluster can be worth.
    Window,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "its compressed data is damaged or cut off",
            Self::Short => "it inflates to less than a cluster",
            Self::Long => "it inflates to more than a cluster",
            Self::Window => "it wants a window of more than 8 MiB",
        })
    }
}

/// The two decoders, with memory that is used again.
pub struct Inflate {
    deflate: Box<DecompressorOxide>,
    zstd: FrameDecoder,
}

impl Inflate {
    pub fn new() -> Self {
        let mut zstd = FrameDecoder::new();
        zstd.set_max_window_size(MAX_WINDOW);
        Self { deflate: Box::default(), zstd }
    }

    /// Fills `cluster` from the stream at the beginning of `bytes`.
    pub fn run(&mut self, how: Compression, bytes: &[u8], cluster: &mut [u8]) -> Result<(), Bad> {
        match how {
            Compression::Zlib => self.deflate(bytes, cluster),
            Compression::Zstd => self.zstd(bytes, cluster),
        }
    }

    fn deflate(&mut self, bytes: &[u8], cluster: &mut [u8]) -> Result<(), Bad> {
        self.deflate.init();
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, count) = decompress(&mut self.deflate, bytes, cluster, 0, flags);
        match status {
            // A whole cluster is enough, whether the stream ends there or not.
            TINFLStatus::Done
            | TINFLStatus::HasMoreOutput
            | TINFLStatus::FailedCannotMakeProgress
            | TINFLStatus::NeedsMoreInput
                if count == cluster.len() =>
            {
                Ok(())
            }
            TINFLStatus::Done => Err(Bad::Short),
            _ => Err(Bad::Data),
        }
    }

    /// One frame after the other until the cluster is full; QEMU takes several, too.
    fn zstd(&mut self, mut bytes: &[u8], cluster: &mut [u8]) -> Result<(), Bad> {
        let mut have = 0;
        while have < cluster.len() {
            if bytes.is_empty() {
                return Err(Bad::Short);
            }
            match self.zstd.reset(&mut bytes) {
                Ok(()) => {}
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    bytes = bytes.get(length as usize..).ok_or(Bad::Data)?;
                    continue;
                }
                Err(FrameDecoderError::WindowSizeTooBig { .. }) => return Err(Bad::Window),
                Err(_) => return Err(Bad::Data),
            }
            have += self.frame(&mut bytes, &mut cluster[have..])?;
        }
        Ok(())
    }

    /// The frame whose header was read. A block at a time, each of which has at most 128 KiB.
    fn frame(&mut self, bytes: &mut &[u8], room: &mut [u8]) -> Result<usize, Bad> {
        let mut have = 0;
        while !self.zstd.is_finished() {
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.zstd.decode_blocks(&mut *bytes, one).map_err(|_| Bad::Data)?;
            have += self.zstd.read(&mut room[have..]).map_err(|_| Bad::Data)?;
            if self.zstd.can_collect() != 0 {
                return Err(Bad::Long);
            }
        }
        match self.zstd.get_checksum_from_data() {
            Some(sum) if Some(sum) != self.zstd.get_calculated_checksum() => Err(Bad::Data),
            _ => Ok(have),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Compression::{Zlib, Zstd};
    use miniz_oxide::deflate::compress_to_vec;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec as zstd_to_vec};

    const CLUSTER: usize = 65536;

    /// Text-like bytes that neither repeat exactly nor are random.
    fn content(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 24
        };
        (0..len).map(|_| u8::try_from(next() & next()).unwrap()).collect()
    }

    fn compressed(how: Compression, bytes: &[u8]) -> Vec<u8> {
        match how {
            Zlib => compress_to_vec(bytes, 6),
            Zstd => zstd_to_vec(bytes, CompressionLevel::Fastest),
        }
    }

    fn run(how: Compression, bytes: &[u8]) -> Result<Vec<u8>, Bad> {
        let mut cluster = vec![0xee; CLUSTER];
        Inflate::new().run(how, bytes, &mut cluster).map(|()| cluster)
    }

    #[test]
    fn a_cluster_comes_out_whatever_follows_it() {
        for how in [Zlib, Zstd] {
            for content in [content(CLUSTER), vec![0; CLUSTER], vec![7; CLUSTER]] {
                let mut bytes = compressed(how, &content);
                assert_eq!(run(how, &bytes).as_ref(), Ok(&content));
                bytes.extend([0x5a; 700]);
                assert_eq!(run(how, &bytes).as_ref(), Ok(&content));
            }
        }
    }

    #[test]
    fn less_than_a_cluster_is_an_error() {
        for how in [Zlib, Zstd] {
            let bytes = compressed(how, &content(CLUSTER - 1));
            assert_eq!(run(how, &bytes), Err(Bad::Short));
        }
    }

    #[test]
    fn a_bomb_stops_at_the_end_of_the_cluster() {
        for how in [Zlib, Zstd] {
            for len in [CLUSTER + 1, 2 * CLUSTER, 4 << 20] {
                let bytes = compressed(how, &vec![0; len]);
                let expected = match how {
                    Zlib => Ok(vec![0; CLUSTER]),
                    Zstd => Err(Bad::Long),
                };
                assert_eq!(run(how, &bytes), expected, "{how:?} {len}");
            }
        }
    }

    #[test]
    fn a_stream_that_is_cut_off_or_garbage_is_an_error() {
        for how in [Zlib, Zstd] {
            let whole = compressed(how, &content(CLUSTER));
            for len in [0, 1, 5, 100, whole.len() / 2, whole.len() - 100] {
                assert!(run(how, &whole[..len]).is_err(), "{how:?} {len}");
                // What lies past the end of the file reads as zeros.
                let mut padded = whole[..len].to_vec();
                padded.resize(whole.len(), 0);
                assert_ne!(run(how, &padded).as_ref(), Ok(&content(CLUSTER)), "{how:?} {len}");
            }
            for garbage in [vec![0xff; 1000], content(1000)] {
                assert!(run(how, &garbage).is_err());
            }
        }
    }

    #[test]
    fn frames_and_skippable_frames_follow_each_other() {
        let content = content(CLUSTER);
        let (first, second) = content.split_at(1000);
        let mut bytes = compressed(Zstd, first);
        bytes.extend(0x184d_2a50u32.to_be_bytes().iter().rev());
        bytes.extend([3, 0, 0, 0, 9, 9, 9]);
        bytes.extend(compressed(Zstd, second));
        assert_eq!(run(Zstd, &bytes), Ok(content));
    }

    #[test]
    fn a_large_window_is_refused_before_memory_is_taken() {
        // Magic; a frame descriptor without a content size; a window of 2^(10 + 27) bytes.
        let bytes = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 27 << 3, 0x01, 0x00, 0x00];
        assert_eq!(run(Zstd, &bytes), Err(Bad::Window));
    }

    #[test]
    fn damage_ends_with_an_error_or_a_whole_cluster() {
        let mut state = 7u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            usize::try_from(state >> 33).unwrap() % below
        };
        let mut inflate = Inflate::new();
        let mut cluster = vec![0; 4096];
        for how in [Zlib, Zstd] {
            let whole = compressed(how, &content(4096));
            for _ in 0..rounds() {
                let mut bytes = whole.clone();
                for _ in 0..=random(4) {
                    let at = random(bytes.len());
                    bytes[at] = u8::try_from(random(256)).unwrap();
                }
                bytes.truncate(bytes.len() - random(bytes.len()) * random(2));
                let _ = inflate.run(how, &bytes, &mut cluster);
            }
        }
    }

    /// More by hand: INFLATE_ROUNDS=10000000.
    fn rounds() -> u32 {
        std::env::var("INFLATE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000)
    }
}
